"""SIGKILL of the launcher, the worker or both at random times; the next command settles what is left."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from hostile_suite.trial import (
    HANG,
    Trial,
    descendants,
    duration,
    finish,
    kill_tree,
    prepare,
    problems_of,
    run,
    running,
    start,
    train,
    trial,
    wait_until,
)  # fmt: skip
from stabletrain.runtime.checkpoints import CheckpointError, Store, verify

KIND = "kills"
WORDS = ("model.pause=0.05",)
NOTICES = 10.0
"""Seconds in which a worker must notice that its launcher is gone."""


def trials(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Kill ``count`` runs, and resume each from its folder.

    Args:
        folder: for the runs.
        seed: of the moments.
        count: how many; a third each for the launcher, the worker and both.
    """
    generator = random.Random(seed)
    took = duration(folder / "whole", train(*WORDS, "run_dir=run", "trainer.max_steps=40"))
    for number in range(count):
        victim = ("launcher", "worker", "both")[number % 3]
        yield _try(prepare(folder / str(number)), victim, generator.uniform(0.3, 1.0) * took)


def _try(folder: Path, victim: str, delay: float) -> Trial:
    name = f"{victim} killed after {delay:.1f} s"
    began, output = time.monotonic(), folder.with_name(f"{folder.name}.output")
    process = start(train(*WORDS, "run_dir=run", "trainer.max_steps=100000"), folder, output)
    time.sleep(delay)
    below = descendants(process.pid)
    for each in (*(below if victim != "launcher" else ()),):
        _kill(each)
    if victim != "worker":
        process.kill()
    ended = finish(process, output, began, delay + HANG)
    problems = [] if victim != "worker" else problems_of(ended, codes=(1,))
    if not wait_until(lambda: not any(each.is_running() and each.status() != "zombie" for each in below), NOTICES + 5):
        problems.append(f"the worker goes on {NOTICES + 5:.0f} s after the launcher was killed")
        for each in below:
            _kill(each)
    resume = ["resume=run"] if _has_checkpoint(folder / "run", problems) else []
    after = run(train(*WORDS, "run_dir=after", "trainer.max_steps=40", *resume), folder, limit=2 * HANG)
    problems += [f"the next command: {each}" for each in problems_of(after, codes=(0,))]
    if left := running(folder):
        problems.append(f"{left} stays RUNNING after the next command")
    kill_tree(process.pid)
    return trial(KIND, name, problems, after if after.code else ended)


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _has_checkpoint(run_folder: Path, problems: list[str]) -> bool:
    """Return whether a run can be resumed; a checkpoint that cannot be read is a problem."""
    checkpoints = run_folder / "checkpoints"
    entries = Store(checkpoints).entries() if checkpoints.is_dir() else []
    for entry in entries:
        try:
            verify(entry.path)
        except CheckpointError as error:
            problems.append(f"unreadable: {error}")
    return bool(entries)
