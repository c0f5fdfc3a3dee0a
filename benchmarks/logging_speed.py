"""What logging to MLflow costs the training loop, how fast metrics are stored, and what a killed process loses.

    python benchmarks/logging_speed.py            print the table (about half a minute)
    python benchmarks/logging_speed.py --write    also write benchmarks/results/logging_speed.md

A step logs ten metrics into a new sqlite database. Costs are processor time of the calling thread, and rates are given
per second of wall clock and, for a busy machine, of processor time. For the last row a process that logs a hundred
steps a second is killed by SIGKILL ten times; lost is the time from the last stored step to the last logged one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import measured

from stabletrain.tracking import MLflowLogger
from stabletrain.tracking.store import ensure_store, open_client

RESULT = Path(__file__).parent / "results" / "logging_speed.md"
STEPS = 10_000
KILLS = 10
NAMES = [f"stability/metric_{number}" for number in range(10)]
VICTIM = """
import sys, time
from stabletrain.tracking import MLflowLogger
logger = MLflowLogger(sys.argv[1], experiment=sys.argv[2], save_dir=sys.argv[3])
logger.experiment
for step in range(100_000):
    logger.log_metrics({"loss": 1.0}, step)
    print(step, flush=True)
    time.sleep(0.01)
"""


def speed(uri: str, folder: str) -> tuple[float, float, float]:
    """Microseconds of the loop per step, metrics per second of wall clock and per second of processor time."""
    logger = MLflowLogger(uri, experiment="speed", save_dir=folder)
    assert logger.experiment is not None
    cost, wall, processor = 0.0, time.perf_counter(), time.process_time()
    for step in range(STEPS):
        metrics = {name: float(step) for name in NAMES}
        began = time.thread_time()
        logger.log_metrics(metrics, step)
        cost += time.thread_time() - began
    assert logger.flush(600)
    count = STEPS * len(NAMES)
    rates = count / (time.perf_counter() - wall), count / (time.process_time() - processor)
    logger.finalize("success")
    return cost / STEPS * 1e6, *rates


def lost(uri: str, folder: str, number: int) -> float:
    """Seconds of metrics that a killed process loses."""
    experiment = f"killed {number}"
    command = [sys.executable, "-c", VICTIM, uri, experiment, folder]
    last = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            last = int(line)
            if last == 200 + 7 * number:
                process.send_signal(signal.SIGKILL)
    client = open_client(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    stored = max(point.step for point in client.get_metric_history(run.info.run_id, "loss"))
    return (last - stored) / 100


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp()
    try:
        uri = f"sqlite:///{folder}/mlflow.db"
        ensure_store(uri)
        cost, wall, processor = speed(uri, folder)
        losses = [lost(uri, folder, number) for number in range(KILLS)]
    finally:
        shutil.rmtree(folder)
    rows = [
        ("cost for the training loop, per step of 10 metrics", f"{cost:.1f} µs", "at most 10 µs"),
        ("metrics stored per second", f"{wall:.0f}", "at least 5000 on an idle machine"),
        ("metrics stored per second of processor time", f"{processor:.0f}", ""),
        (f"lost by SIGKILL, largest of {KILLS}", f"{max(losses):.2f} s", "at most 1 s"),
    ]
    text = "\n".join(["| what | measured | required |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)])
    print(text)
    if arguments.write:
        load = f"load average {os.getloadavg()[1]:.1f} in the last 5 minutes"
        head = f"# Logging to MLflow\n\n`python benchmarks/logging_speed.py --write`. {measured()}; {load}."
        RESULT.write_text(f"{head}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
