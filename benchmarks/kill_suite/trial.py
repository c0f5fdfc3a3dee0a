"""One trial: a training is killed once or several times, restarted each time, and its final state is compared."""

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
from stabletrain.runtime.checkpoints import CheckpointError, newest
from stabletrain.testing.checks.equality import differences

LONGEST = 120.0
"""Timeout of a training in seconds."""


def run_whole(setup: Setup, folder: Path) -> float:
    """Run the training to its end; return its duration in seconds."""
    began = time.monotonic()
    folder.mkdir()
    _finish(start(setup, folder, seed=0), folder)
    return time.monotonic() - began


def run_killed(setup: Setup, folder: Path, moments: Sequence[Moment], victims: Sequence[int], whole: Path) -> Result:
    """Kill and restart a training at each of some times, let it finish, and compare its final state.

    Args:
        setup: settings of the training.
        folder: folder of the training; removed if there is no difference.
        moments: times of the kills, each relative to the last restart; if the training ends before, earlier times.
        victims: the ranks that are killed; the others must end by themselves.
        whole: folder of the same training, not interrupted.
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
    raise TooLate("the training ended before every time of a kill: are checkpoints written at all?")


def _run(setup: Setup, folder: Path, moments: Sequence[Moment], victims: Sequence[int], whole: Path) -> Result:
    result, found = Result(), None
    try:
        for number, moment in enumerate(moments):
            found = _kill(_start(setup, folder, found, number), moment, victims, folder, result)
            if found is not None and _step(found) == _step(newest(whole / "checkpoints")):
                # no step is left: only rank 0's batch statistics are in a checkpoint, and no forward pass shares them
                raise TooLate("killed after the last step")
        for path in folder.glob("end-*.pt"):
            path.unlink()
        _finish(_start(setup, folder, found, len(moments)), folder)
        result.different = _compare(setup, folder, whole)
    except (RuntimeError, CheckpointError) as error:
        result.different = [str(error)]
    return result


def _step(checkpoint: Path) -> str:
    return checkpoint.name.split("-")[1]


def _start(setup: Setup, folder: Path, found: Path | None, number: int) -> list[Any]:
    """Start with seed 0, or resume with another seed, which must not change the result."""
    if found is None:
        return start(setup, folder, seed=0)
    return start(setup, folder, seed=1000 + number, ckpt_path=found.parent)


def _kill(processes: list[Any], moment: Moment, victims: Sequence[int], folder: Path, result: Result) -> Path | None:
    checkpoints = folder / "checkpoints"
    left_before = writing(checkpoints)
    try:
        moment.wait(checkpoints, lambda: not all(each.is_alive() for each in processes))
    except TooLate:
        _finish(processes, folder)  # raises if the training failed
        raise
    for rank in victims:
        os.kill(processes[rank].pid, signal.SIGKILL)
    for rank in victims:
        processes[rank].join()
    survivors = [each for rank, each in enumerate(processes) if rank not in victims]
    result.survivors += len(survivors)
    result.ended_themselves += _end(survivors, PATIENCE.total_seconds() + 10.0)
    return result.check(checkpoints, left_before)


def _end(processes: Sequence[Any], seconds: float) -> int:
    """Wait for processes to end, kill the others at the timeout, and return how many ended by themselves."""
    deadline = time.monotonic() + seconds
    for each in processes:
        each.join(max(0.0, deadline - time.monotonic()))
    hanging = [each for each in processes if each.is_alive()]
    for each in hanging:
        each.kill()
        each.join()
    return len(processes) - len(hanging)


def _finish(processes: Sequence[Any], folder: Path) -> None:
    """Wait for a training to end.

    Raises:
        RuntimeError: if it fails or hangs; the message contains its output.
    """
    ended = _end(processes, LONGEST)
    if ended < len(processes) or any(each.exitcode for each in processes):
        output = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("log-*.txt")))
        raise RuntimeError(f"{ended} of {len(processes)} processes ended by themselves\n{output}")


def _compare(setup: Setup, folder: Path, whole: Path) -> list[str]:
    """Return the differences in the final state of each rank and in the last checkpoint."""
    found = []
    for rank in range(setup.processes):
        mine, theirs = (torch.load(each / f"end-{rank}.pt", weights_only=True) for each in (folder, whole))
        found += differences(mine, theirs, f"rank {rank}")
    mine, theirs = (final_checkpoint(each / "checkpoints") for each in (folder, whole))
    return [*found, *differences(mine, theirs, "checkpoint")]
