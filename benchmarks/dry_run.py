"""Dry runs against real ranks: memory and messages, and what a plan of 64 ranks costs.

    python benchmarks/dry_run.py            print the tables (about 4 minutes on 2 cores)
    python benchmarks/dry_run.py --write    also write benchmarks/results/dry_run.md

A small GPT is planned, and trained by gloo processes on the CPU; the same callback follows a step of both. The recipe
gpt_fsdp2_8gpu (354 M parameters) is planned for 8 nodes of 8 processes by the command line; its processor time and the
largest memory of its processes are those that the system reports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import planned_runs
from machine import measured
from rank_pool import on_ranks

ROOT = Path(__file__).parents[1]
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("single", 1, {}),
    ("ddp", 2, {}),
    ("ddp", 2, {"accumulate_grad_batches": 3}),
    ("ddp_zero1", 2, {}),
    ("fsdp2", 2, {}),
    ("fsdp2", 4, {}),
    ("fsdp2", 2, {"accumulate_grad_batches": 3}),
    ("fsdp2", 2, {"precision": "bf16-mixed"}),
    ("fsdp2", 2, {"precision": "bf16-true"}),
    ("fsdp2_checkpoint", 2, {}),
    ("zero2", 2, {}),
    ("hsdp", 4, {}),
    ("tensor_parallel", 2, {}),
    ("fsdp2_tp", 4, {}),
]
LARGE = ["gpt_fsdp2_8gpu", "dry_run=true", "launch.processes=8", "launch.nodes=8", "memory=80GB", "--json"]


def compare(kind: str, size: int, options: dict[str, Any]) -> str:
    """A row of the table: state and peak of the plan and of a real rank, and whether all messages are equal."""
    plan = planned_runs.planned(kind, size, options)
    with tempfile.TemporaryDirectory() as folder:
        real = on_ranks(planned_runs.measured, size, Path(folder), kind, options, limit=300)[0]
    rank = plan.per_rank
    state = [rank.parameters + rank.gradients + (rank.optimizer_state or 0)]
    state.append(real["parameters"] + real["gradients"] + real["optimizer_state"])
    messages = [(each.kind, each.count, each.bytes) for each in plan.collectives]
    equal = "equal" if messages == real["collectives"] else "differ"
    parts = "equal" if dict(rank.peak_parts) == real["peak_parts"] else "differ"
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    cells = (f"`{kind}`", str(size), given, *(f"{n:,}" for n in (*state, rank.peak or 0, real["peak"])), parts, equal)
    return f"| {' | '.join(cells)} |"


def large() -> str:
    """A sentence about the plan of 64 ranks."""
    command = [sys.executable, "-m", "stabletrain", "train", *LARGE]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=900)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    plan = json.loads(done.stdout)["jobs"][0]["plan"]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return (
        f"{plan['parameters']:,} parameters on {plan['processes'] * plan['nodes']} ranks: {cpu:.0f} s of processor "
        f"time, launcher and imports included, and {after.ru_maxrss / 2**20:.2f} GiB in the largest process."
    )


def main() -> None:
    """Print the tables, and write the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    lines = [
        "# Dry runs",
        "",
        f"{measured()}. The machine was shared.",
        "",
        f"    python benchmarks/dry_run.py{' --write' if write else ''}",
        "",
        large(),
        "",
        "    stabletrain train " + " ".join(LARGE),
        "",
        "The same callback on the ranks of a plan and on real gloo ranks: bytes of the first rank. A small GPT; state: "
        "parameters, gradients and optimizer state.",
        "",
        "| strategy | processes | options | state, plan | real | peak, plan | real | peak's parts | messages |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        lines.append(compare(*case))
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if write:
        (ROOT / "benchmarks" / "results" / "dry_run.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
