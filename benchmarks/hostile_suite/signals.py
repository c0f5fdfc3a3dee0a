"""SIGINT and SIGTERM at every stage of the start of a run."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from hostile_suite.trial import (
    HANG,
    INTERRUPTS,
    Trial,
    descendants,
    duration,
    finish,
    prepare,
    problems_of,
    running,
    start,
    train,
    trial,
    wait_until,
)  # fmt: skip

KIND = "signals at every stage of start-up"
WORDS = ("run_dir=run", "model.pause=0.1")


def trials(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Send a signal to the launcher at ``count`` moments, spread evenly from its first instant to the tenth step.

    Each run must end with the signal's exit code, without a traceback, without a process that goes on and without a run
    in MLflow that stays RUNNING. Every fourth time the signal is sent twice, as by an impatient user.

    Args:
        folder: for the runs.
        seed: of the moments.
        count: how many.
    """
    generator = random.Random(seed)
    took = duration(folder / "whole", train(*WORDS, "trainer.max_steps=10"))
    for number in range(count):
        signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
        delay = (number + generator.random()) / count * took
        yield _try(prepare(folder / str(number)), signum, delay, twice=number % 4 >= 2)


def _try(folder: Path, signum: signal.Signals, delay: float, *, twice: bool) -> Trial:
    name = f"{signum.name}{' twice' if twice else ''} after {delay:.1f} s"
    began, output = time.monotonic(), folder.with_name(f"{folder.name}.output")
    process = start(train(*WORDS, "trainer.max_steps=100000"), folder, output)
    time.sleep(delay)
    started = descendants(process.pid)
    process.send_signal(signum)
    if twice:
        time.sleep(1.0)
        process.send_signal(signum)
    ended = finish(process, output, began, delay + HANG)
    # in the first tenth of a second Python itself has not started, and the system's default ends the process
    codes = [INTERRUPTS[signum], *([-signum] if delay < 1.0 else [])]
    problems = [each for each in problems_of(ended, codes=codes) if each != "no message" or delay >= 1.0]
    if not wait_until(lambda: not any(each.is_running() and each.status() != "zombie" for each in started), 10):
        problems.append("a process goes on")
    if left := running(folder):
        problems.append(f"{left} stays RUNNING")
    return trial(KIND, name, problems, ended)
