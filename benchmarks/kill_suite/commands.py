"""Trials of the command line: `stabletrain train ...` is killed, then run again with `resume=<run folder>`."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import psutil

from kill_suite.equality import final_checkpoint
from kill_suite.moments import Moment
from kill_suite.result import Result
from stabletrain.testing.checks.equality import differences

EPOCHS, WRITES = 4, 20
"""For one process; with two processes an epoch has half as many steps."""
RECIPE = ("digits_cnn", "plugins.checkpoints.every=4", "logger=none")
KILLED = ("the worker", "everything")
"""The processes to kill: only one that trains, or the launcher and all processes that it has started."""


def run_whole(processes: int, folder: Path) -> None:
    """Run the training to its end."""
    _finish(_start(processes, folder))


def run_killed(processes: int, folder: Path, killed: str, generator: random.Random, whole: Path) -> Result:
    """Kill a training, resume it from its run's folder, and compare the last checkpoints.

    Args:
        processes: ranks.
        folder: the run's folder; the resumed run has the folder ``<folder>-resumed``.
        killed: one of `KILLED`.
        generator: for drawing the time of the kill.
        whole: folder of the same training, not interrupted.
    """
    result = Result()
    training = _start(processes, folder)
    moment = Moment(generator.uniform(0, 0.02), generator.randint(2, WRITES // 2))
    moment.wait(folder / "checkpoints", lambda: training.poll() is not None)
    started = psutil.Process(training.pid).children(recursive=True)
    # the last one: torchrun, whose command line contains the same word, comes before the workers
    workers = [each for each in started if "stabletrain.worker" in each.cmdline()]
    for each in [psutil.Process(training.pid), *started] if killed == "everything" else workers[-1:]:
        each.kill()
    training.communicate()
    assert training.returncode != 0, "the launcher reported a killed training as finished"
    psutil.wait_procs(started, 60)
    found = result.check(folder / "checkpoints", set())
    assert found is not None
    resumed = folder.with_name(f"{folder.name}-resumed")
    try:
        _finish(_start(processes, resumed, f"resume={folder}"))
    except RuntimeError as error:
        result.different = [str(error)]
        return result
    result.different = list(differences(*(final_checkpoint(each / "checkpoints") for each in (resumed, whole))))
    return result


def _start(processes: int, folder: Path, *words: str) -> subprocess.Popen[str]:
    length = f"trainer.max_epochs={EPOCHS * processes}"
    command = ["train", *RECIPE, length, f"launch.processes={processes}", f"run_dir={folder}", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "stabletrain", *command],
        cwd=folder.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(training: subprocess.Popen[str]) -> None:
    """Wait for a training to end.

    Raises:
        RuntimeError: if it fails; the message contains its output.
    """
    output, _ = training.communicate(timeout=300)
    if training.returncode:
        raise RuntimeError(f"exit code {training.returncode}\n{output[-3000:]}")
