"""How long `stabletrain ui` takes until MLflow answers, and what it leaves behind.

    python benchmarks/ui.py            ten times from start to Ctrl-C; print the table
    python benchmarks/ui.py --write    also write benchmarks/results/ui.md

Each start uses one database with a run in it, and is ended by SIGINT as soon as the address was printed. Processes of
the server's session that exist 2 s after the end of `stabletrain ui` are left behind.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil
from machine import measured

from stabletrain.tracking.runs import create_run
from stabletrain.tracking.store import ensure_store

RESULT = Path(__file__).parent / "results" / "ui.md"
LIMIT = "at most 15 on an idle machine"


class Trial(NamedTuple):
    """One start.

    Args:
        ready: seconds until the address.
        processor: seconds of processor time until then, of all processes.
        ended: seconds from Ctrl-C until the end.
        processes: of the server.
        left: how many of them were left.
    """

    ready: float
    processor: float
    ended: float
    processes: int
    left: int


def trial(uri: str) -> Trial:
    """Start `stabletrain ui`, end it, and count."""
    command = [sys.executable, "-P", "-m", "stabletrain", "ui", "--uri", uri]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("Ctrl-C"):
            assert process.poll() is None
        ready = time.monotonic() - started
        (leader,) = (each.pid for each in psutil.Process(process.pid).children())
        count, processor = in_session(leader), processor_time(process.pid)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait()
        ended = time.monotonic() - asked
    time.sleep(2)
    return Trial(ready, processor, ended, count, in_session(leader))


def processor_time(pid: int) -> float:
    """Processor time of a process, of those that it has started, and of their ended children."""
    process = psutil.Process(pid)
    return sum(sum(each.cpu_times()[:4]) for each in (process, *process.children(recursive=True)))


def in_session(leader: int) -> int:
    """Processes in a session, without those that have ended and wait for their parent."""
    count = 0
    for process in psutil.process_iter():
        try:
            count += os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.Error):
            continue
    return count


def table(trials: list[Trial]) -> str:
    """The results."""
    ready, ended = [each.ready for each in trials], [each.ended for each in trials]
    rows = [
        ("start to address, s", f"{statistics.median(ready):.1f}", f"{max(ready):.1f}", LIMIT),
        ("processor time until then, s", f"{statistics.median(t.processor for t in trials):.1f}",
         f"{max(t.processor for t in trials):.1f}", ""),
        ("Ctrl-C to end, s", f"{statistics.median(ended):.1f}", f"{max(ended):.1f}", ""),
        ("processes of the server", f"{statistics.median(t.processes for t in trials):g}",
         str(max(t.processes for t in trials)), ""),
        ("processes left", f"{statistics.median(t.left for t in trials):g}", str(max(t.left for t in trials)), "0"),
    ]  # fmt: skip
    lines = ["| what | median | largest | required |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--trials", type=int, default=10)
    arguments = parser.parse_args()
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        ensure_store(uri)
        create_run(uri, "demo")
        trials = [trial(uri) for _ in range(arguments.trials)]
    text = table(trials)
    print(text)
    if arguments.write:
        load = f"load average {os.getloadavg()[1]:.1f} in the last 5 minutes"
        head = f"# `stabletrain ui`\n\n`python benchmarks/ui.py --write`: {len(trials)} starts. {measured()}; {load}."
        RESULT.write_text(f"{head}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
