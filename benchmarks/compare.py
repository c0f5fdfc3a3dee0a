"""Time of ``stabletrain compare --html`` for 20 runs of 10,000 steps, and the size of its page.

    python benchmarks/compare.py [--write]

The command runs in a process of its own, as a user starts it: imports, reading the store, the tables and the page.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
from machine import measured
from recorded_runs import Run

RESULTS = Path(__file__).parent / "results" / "compare.md"
RUNS, STEPS = 20, 10_000
SECONDS, BYTES = 5.0, 1_500_000
CLIP = {
    "none": None,
    "norm": {"_target_": "stabletrain.ClipNorm", "max_norm": 1.0},
    "zscore": {"_target_": "stabletrain.ClipZScore", **{f"argument_{i}": 1.0 for i in range(15)}},
    "percentile": {"_target_": "stabletrain.ClipPercentile", **{f"argument_{i}": 2.0 for i in range(8)}},
}


def make(folder: Path) -> str:
    """Record the runs: 4 ways to clip, 5 seeds each; 150 parameters and 6 metrics a run."""
    from stabletrain.tracking import ensure_store

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    ensure_store(uri)
    for number in range(RUNS):
        clip, seed = list(CLIP)[number % 4], number // 4
        run = Run(STEPS, seed=number)
        run.skip(STEPS // 3)
        clipped = np.random.default_rng(number).choice(STEPS, (0, STEPS // 2, 300, 1000)[number % 4], replace=False)
        run.clip(clipped)
        if number % 3 == 0:
            run.spike(int(STEPS * 0.45), 100)
        config = {
            "seed": seed,
            "choices": {"plugins/clip": clip, "optimizer": "adamw"},
            "plugins": {"clip": CLIP[clip]},
            "model": {f"size_{i}": i for i in range(120)},
        }
        run.record(
            uri, folder / "runs" / str(number), experiment="bench", name=f"clip={clip} seed={seed}", params=config
        )
    return uri


def timed(folder: Path, uri: str, words: list[str]) -> tuple[float, float]:
    """Seconds of one command: by the clock, and of the CPU."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.perf_counter()
    command = [sys.executable, "-m", "stabletrain", "compare", "--experiment", "bench", *words]
    subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        uri = make(folder)
        rows = []
        for what, words in (("tables", []), ("tables and page", ["--html", "page.html"])):
            for where in ("folders of the runs", "store alone"):
                if where == "store alone":
                    (folder / "runs").rename(folder / "away")
                seconds = [timed(folder, uri, words) for _ in range(arguments.times)]
                if where == "store alone":
                    (folder / "away").rename(folder / "runs")
                rows.append((f"{what}, from the {where}", seconds))
        size = (folder / "page.html").stat().st_size
    lines = [
        f"# Comparing {RUNS} runs of {STEPS:,} steps, {date.today().isoformat()}",
        "",
        f"`python benchmarks/compare.py --write`. {measured()}.",
        f"Each time is that of a whole process, imports included: the median of {arguments.times}, and the slowest;",
        f"CPU: the median of its CPU time. The load of the machine was {os.getloadavg()[1]:.1f}: above the number of",
        "cores, the clock measures other processes, too.",
        "",
        "| what | measured | slowest | CPU | required |",
        "|---|---|---|---|---|",
    ]
    for what, seconds in rows:
        required = f"under {SECONDS:g} s" if "page" in what else ""
        clock, cpu = zip(*seconds, strict=True)
        middle = f"{statistics.median(clock):.2f} s | {max(clock):.2f} s | {statistics.median(cpu):.2f} s"
        lines.append(f"| {what} | {middle} | {required} |")
    lines.append(f"| size of the page | {size / 1e6:.2f} MB | | | under {BYTES / 1e6:g} MB |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
