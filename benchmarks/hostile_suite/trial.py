"""One trial: run a command in a folder of its own, and look for what it must not do."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

HANG = 60.0
"""Seconds after which a command that should have ended counts as hanging."""
MARK = "PWNED"
"""Name of the file that hostile inputs try to make."""
WORKLOAD = Path(__file__).parent / "workload"
"""Folder with a small module and its recipe, copied into the folder of a trial."""


@dataclass(frozen=True)
class Trial:
    """One thing that was tried.

    Args:
        kind: row of the table.
        name: what was tried.
        problem: what happened that must not; empty if it held.
    """

    kind: str
    name: str
    problem: str = ""

    @property
    def held(self) -> bool:
        """Whether everything was as it must be."""
        return not self.problem


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Args:
        code: exit code; None if it hung and was killed.
        output: both streams.
        seconds: from its start.
    """

    code: int | None
    output: str
    seconds: float


def prepare(folder: Path, *, workload: bool = True) -> Path:
    """Make the folder of a trial, with the small workload in it.

    Args:
        folder: does not exist yet.
        workload: whether the recipe and its module are copied.
    """
    folder.mkdir(parents=True)
    if workload:
        shutil.copytree(WORKLOAD, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def stabletrain(*words: str) -> list[str]:
    """Return the command line of ``stabletrain`` in this Python."""
    return [sys.executable, "-P", "-m", "stabletrain", *words]


def train(*words: str) -> list[str]:
    """Return the command line that trains the small workload of `prepare`.

    Args:
        words: overrides.
    """
    return stabletrain("train", "./faulty.yaml", "--trust", "faulty_workload", *words)


def duration(folder: Path, command: Sequence[str]) -> float:
    """Return the seconds that a training of the small workload takes.

    Args:
        folder: for the run.
        command: from `train`.
    """
    return run(command, prepare(folder), limit=3 * HANG).seconds


def start(command: Sequence[str], folder: Path, output: Path) -> subprocess.Popen[bytes]:
    """Start a command in a folder; both of its streams go to a file, which no killed reader can close.

    Args:
        command: program and arguments.
        folder: current folder of the command.
        output: file for its output.
    """
    variables = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    variables |= {"OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    with output.open("wb") as file:
        return subprocess.Popen(list(command), cwd=folder, env=variables, stdout=file, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], output: Path, began: float, limit: float) -> Ended:
    """Wait for a command; if it takes longer than ``limit`` seconds, kill it and all processes that it has started."""
    try:
        code: int | None = process.wait(limit)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.wait()
        code = None
    return Ended(code, output.read_text(errors="replace"), time.monotonic() - began)


def run(command: Sequence[str], folder: Path, *, limit: float = HANG) -> Ended:
    """Run a command to its end.

    Args:
        command: program and arguments.
        folder: current folder of the command.
        limit: seconds after which it counts as hanging.
    """
    began, output = time.monotonic(), folder.with_name(f"{folder.name}.output")
    return finish(start(command, folder, output), output, began, limit)


def kill_tree(pid: int) -> None:
    """Kill a process and all processes that it has started."""
    try:
        parent = psutil.Process(pid)
        everything = [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for each in everything:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue


def descendants(pid: int) -> list[psutil.Process]:
    """Return the processes that a process has started, directly or not."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def files(folder: Path) -> set[str]:
    """Return the relative paths of everything in a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


def running(folder: Path) -> list[str]:
    """Return the names of the MLflow runs in a trial's default store that are still RUNNING."""
    store = folder / "mlflow.db"
    if not store.is_file():
        return []
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=10) as database:
        try:
            return [str(name) for (name,) in database.execute("SELECT name FROM runs WHERE status = 'RUNNING'")]
        except sqlite3.DatabaseError:
            return []


def statuses(folder: Path) -> list[str]:
    """Return the status of each MLflow run in a trial's default store."""
    store = folder / "mlflow.db"
    if not store.is_file():
        return []
    with sqlite3.connect(f"file:{store}?mode=ro", uri=True, timeout=10) as database:
        return [str(status) for (status,) in database.execute("SELECT status FROM runs ORDER BY start_time")]


def problems_of(ended: Ended, *, codes: Iterable[int], traceback: bool = False) -> list[str]:
    """Return what is wrong with an end: a hang, a traceback, or an exit code that is not among ``codes``.

    Args:
        ended: how the command ended.
        codes: the exit codes that are right.
        traceback: whether one is right, as for a bug in the user's module.
    """
    if ended.code is None:
        return [f"hung for {ended.seconds:.0f} s"]
    found = []
    if ended.code not in tuple(codes):
        found.append(f"exit code {ended.code}, expected {' or '.join(map(str, codes))}")
    if not traceback and "Traceback (most recent call last)" in ended.output:
        found.append("a traceback")
    if not ended.output.strip() and ended.code != 0:
        found.append("no message")
    return found


def trial(kind: str, name: str, problems: Sequence[str], ended: Ended | None = None) -> Trial:
    """Return a trial from what was found; the end of the output explains a failure."""
    if not problems:
        return Trial(kind, name)
    tail = "" if ended is None else " | ".join(ended.output.strip().splitlines()[-4:])[-600:]
    return Trial(kind, name, f"{'; '.join(problems)} [{tail}]")


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until a condition holds; return whether it did in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


INTERRUPTS = {signal.SIGINT: 130, signal.SIGTERM: 143}
"""Signals that end a run, and the exit code of each."""
