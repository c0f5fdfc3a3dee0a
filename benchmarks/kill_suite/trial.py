"""One trial: a training is killed once or several times, started again each time, and compared at its end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kill_suite.equality import final_checkpoint
from kill_suite.moments import Moment, TooLate, writing
from kill_suite.result import Result
from kill_suite.training import PATIENCE, Setup, start
from stabletrain.runtime.checkpoints import CheckpointError
from stabletrain.testing.checks.equality import differences

LONGEST = 120.0
"""Seconds after which a training is believed to hang."""


def run_whole(setup: Setup, folder: Path) -> float:
    """Train without a kill; the seconds that it took."""
    began = time.monotonic()
    folder.mkdir()
    _finish(start(setup, folder, seed=0), folder)
    return time.monotonic() - began


def run_killed(setup: Setup, folder: Path, moments: Sequence[Moment], victims: Sequence[int], whole: Path) -> Result:
    """Kill a training at each of these moments, let it end after the last, and compare.

    Args:
        setup: of the training.
        folder: for it; removed if it ended as it should.
        moments: each counts from the start after the kill before. Where the training was over too soon, earlier ones.
        victims: the ranks that are killed; the others get the time to notice.
        whole: folder of the same training without a kill.
    """
    for _ in range(8):
        folder.mkdir()
        try:
            result = _run(setup, folder, moments, victims, whole)
        except TooLate:
            moments = [each.earlier() for each in moments]
            shutil.rmtree(folder)
            continue
        if not result.different:
            shutil.rmtree(folder)
        return result
    raise TooLate("no moment was early enough: are checkpoints written at all?")


def _run(setup: Setup, folder: Path, moments: Sequence[Moment], victims: Sequence[int], whole: Path) -> Result:
    result, found = Result(), None
    try:
        for number, moment in enumerate(moments):
            found = _kill(_start(setup, folder, found, number), moment, victims, folder, result)
        for path in folder.glob("end-*.pt"):
            path.unlink()
        _finish(_start(setup, folder, found, len(moments)), folder)
        result.different = _compare(setup, folder, whole)
    except (RuntimeError, CheckpointError) as error:
        result.different = [str(error)]
    return result


def _start(setup: Setup, folder: Path, found: Path | None, number: int) -> list[Any]:
    """Begin, with the seed of the whole training; or go on, where no seed may matter."""
    if found is None:
        return start(setup, folder, seed=0)
    return start(setup, folder, seed=1000 + number, ckpt_path=found.parent)


def _kill(processes: list[Any], moment: Moment, victims: Sequence[int], folder: Path, result: Result) -> Path | None:
    checkpoints = folder / "checkpoints"
    left_before = writing(checkpoints)
    try:
        moment.wait(checkpoints, lambda: not all(each.is_alive() for each in processes))
    except TooLate:
        _finish(processes, folder)  # over, or broken?
        raise
    for rank in victims:
        os.kill(processes[rank].pid, signal.SIGKILL)
    for rank in victims:
        processes[rank].join()
    survivors = [each for rank, each in enumerate(processes) if rank not in victims]
    result.survivors += len(survivors)
    result.ended_themselves += _end(survivors, PATIENCE.total_seconds() + 10.0)
    return result.look_at(checkpoints, left_before)


def _end(processes: Sequence[Any], seconds: float) -> int:
    """Wait for processes to end, and kill those that do not; how many did."""
    deadline = time.monotonic() + seconds
    for each in processes:
        each.join(max(0.0, deadline - time.monotonic()))
    hanging = [each for each in processes if each.is_alive()]
    for each in hanging:
        each.kill()
        each.join()
    return len(processes) - len(hanging)


def _finish(processes: Sequence[Any], folder: Path) -> None:
    """Let a training end.

    Raises:
        RuntimeError: if it fails or hangs; with what it said.
    """
    ended = _end(processes, LONGEST)
    if ended < len(processes) or any(each.exitcode for each in processes):
        said = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("log-*.txt")))
        raise RuntimeError(f"{ended} of {len(processes)} processes ended by themselves\n{said}")


def _compare(setup: Setup, folder: Path, whole: Path) -> list[str]:
    """What each rank had at the end, and what is in the last checkpoint."""
    found = []
    for rank in range(setup.processes):
        mine, theirs = (torch.load(each / f"end-{rank}.pt", weights_only=True) for each in (folder, whole))
        found += differences(mine, theirs, f"rank {rank}")
    mine, theirs = (final_checkpoint(each / "checkpoints") for each in (folder, whole))
    return [*found, *differences(mine, theirs, "checkpoint")]
