"""One trial: a run under torchrun loses processes, is restarted by its launcher, and its final state is compared."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
from kill_suite.equality import final_checkpoint

from stabletrain.launch.attempts import Attempt, read_attempts, seconds_of
from stabletrain.launch.began import recorded_steps
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.testing.checks.equality import differences

TIMEOUT = 20
"""``launch.timeout`` in seconds."""
STEPS = 60
LONGEST = 900.0
"""Timeout of a run in seconds."""
_TRAINED = ("state_dict", "optimizer_states")
"""Of a checkpoint: weights and optimizer state."""
_MOST = 10
"""Differences of a part that are kept."""
RECIPE = (
    *("char_gpt", "model.layers=2", "model.heads=2", "model.width=32", "model.context=32", "model.dropout=0.1"),
    *("model.sample_length=0", "data.context=32", "data.batch_size=4", f"trainer.max_steps={STEPS}"),
    *("trainer.val_check_interval=20", "trainer.limit_val_batches=2", "plugins.checkpoints.every=5", "logger=none"),
    *("launch=torchrun", f"launch.timeout={TIMEOUT}s", "trainer.accumulate_grad_batches=2"),
)


@dataclass(frozen=True)
class Setup:
    """Of a run.

    Args:
        strategy: ddp or fsdp2.
        processes: number of ranks.
    """

    strategy: str
    processes: int

    @property
    def name(self) -> str:
        """For tables and folders."""
        return f"{self.strategy} x{self.processes}"


@dataclass(frozen=True, kw_only=True)
class Harm:
    """What is done to a run.

    Args:
        what: ``kill`` or ``stop``: one rank; ``all``: SIGKILL to all ranks; ``torchrun``: SIGKILL to torchrun;
            ``again``: SIGKILL to a rank, and to one that imports in the attempt after it.
        step: attempted steps after which it is done.
        rank: the victim.
        wait: further seconds.
    """

    what: str
    step: int
    rank: int
    wait: float

    @classmethod
    def drawn(cls, what: str, setup: Setup, generator: random.Random) -> Harm:
        """Draw step, rank and time.

        Args:
            what: see above.
            setup: of the run.
            generator: of the numbers.
        """
        step, rank = generator.randint(1, STEPS - 8), generator.randrange(setup.processes)
        return cls(what=what, step=step, rank=rank, wait=generator.uniform(0, 0.03))


@dataclass(kw_only=True)
class Trial:
    """The result of one trial.

    Args:
        what: of `Harm`.
        setup: name of the `Setup`.
        step: at which the harm was done.
        rank: the victim.
        attempts: of the run.
        lost: steps that were made again, over all attempts.
        seconds: from the harm to the first step after it, without the time in which the processes imported.
        imports: that time.
        different: differences of weights and optimizer state from those of the undisturbed run, or why it failed.
        others: differences of the rest of the checkpoint: counters, random numbers, the state of every plugin.
    """

    what: str
    setup: str
    step: int = 0
    rank: int = 0
    attempts: int = 1
    lost: int = 0
    seconds: float = 0.0
    imports: float = 0.0
    different: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


class TooLate(Exception):
    """The run had ended before the harm was done."""


def run_whole(setup: Setup, folder: Path) -> None:
    """Run the training to its end.

    Args:
        setup: of the run.
        folder: the run's folder.

    Raises:
        RuntimeError: if it fails.
    """
    _finish(start(setup, folder))


def run_harmed(setup: Setup, folder: Path, harm: Harm, whole: Path, *words: str) -> Trial:
    """Harm a run, let it finish, and compare its final checkpoint with that of an undisturbed run.

    Args:
        setup: of both runs.
        folder: the run's folder; removed if there is no difference.
        harm: what is done to it.
        whole: folder of the undisturbed run.
        words: further overrides.

    Raises:
        TooLate: if the run ended before.
    """
    trial = Trial(what=harm.what, setup=setup.name, step=harm.step, rank=harm.rank)
    training = start(setup, folder, *words)
    try:
        harmed_at = _do(harm, training, folder)
        _finish(training)
        attempts = read_attempts(folder)
        trial.attempts, trial.lost = len(attempts), sum(each.steps_lost for each in attempts)
        trial.seconds, trial.imports = _seconds(harmed_at, attempts)
        mine, theirs = (_without_times(final_checkpoint(each / "checkpoints")) for each in (folder, whole))
        for key in sorted({*mine, *theirs}):
            found = [each[:200] for each in islice(differences(mine.get(key), theirs.get(key), key), _MOST)]
            (trial.different if key in _TRAINED else trial.others).extend(found)
        if len(attempts) < 2:
            trial.different.append(f"{len(attempts)} attempts are recorded")
    except (RuntimeError, CheckpointError) as error:
        trial.different = [str(error)]
    finally:
        _end(training)
    if not trial.different and not trial.others:
        shutil.rmtree(folder)
    return trial


def _without_times(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Without the values that the progress line has read, which depend on the clock."""
    for rank in checkpoint["callbacks"]["resume_exactly"]["ranks"]:
        del rank["epoch"]["shown"]
    return checkpoint


def start(setup: Setup, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a run.

    Args:
        setup: of the run.
        folder: the run's folder.
        words: further overrides.
    """
    size = [f"strategy={setup.strategy}", f"launch.processes={setup.processes}", f"run_dir={folder}"]
    with open(f"{folder}.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "stabletrain", "train", *RECIPE, *size, *words],
            cwd=folder.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def workers(training: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return the processes that train, by rank.

    Args:
        training: the launcher.
    """
    found: dict[int, psutil.Process] = {}
    for each in psutil.Process(training.pid).children(recursive=True):
        try:
            rank = each.environ().get("RANK", "")
            if rank.isdecimal() and "stabletrain.worker" in each.cmdline():
                found.setdefault(int(rank), each)
        except psutil.Error:
            continue
    return found


def _do(harm: Harm, training: subprocess.Popen[str], folder: Path) -> float:
    """Do the harm; return when, in seconds since 1970."""
    _wait(training, lambda: recorded_steps(folder) > 0, pause=0.05)
    ranks = workers(training)
    if len(ranks) <= harm.rank:
        raise TooLate
    _wait(training, lambda: recorded_steps(folder) >= harm.step, pause=0.002)
    time.sleep(harm.wait)
    try:
        if harm.what == "all":
            for each in ranks.values():
                each.kill()
        elif harm.what == "torchrun":
            ranks[0].parent().kill()  # type: ignore[union-attr]
        else:
            ranks[harm.rank].send_signal(signal.SIGSTOP if harm.what == "stop" else signal.SIGKILL)
    except psutil.NoSuchProcess:
        raise TooLate from None
    harmed_at = time.time()
    if harm.what == "again":
        earlier = {each.pid for each in ranks.values()}
        fresh: list[psutil.Process] = []

        def is_starting() -> bool:
            fresh[:] = [each for each in workers(training).values() if each.pid not in earlier]
            return bool(fresh)

        _wait(training, is_starting, pause=0.05)
        time.sleep(1.0)
        fresh[-1].kill()
    return harmed_at


def _wait(training: subprocess.Popen[str], condition: object, pause: float) -> None:
    deadline = time.monotonic() + LONGEST
    while not condition():  # type: ignore[operator]
        if training.poll() is not None:
            raise TooLate
        if time.monotonic() > deadline:
            raise RuntimeError(f"nothing happened within {LONGEST:g} s")
        time.sleep(pause)


def _seconds(harmed_at: float, attempts: Sequence[Attempt]) -> tuple[float, float]:
    """From the harm to the next step without the time of imports, and that time."""
    after = [each for each in attempts if seconds_of(each.end) > harmed_at][1:]
    resumed = next((each for each in after if each.first_step), None)
    if resumed is None or resumed.first_step is None:
        return 0.0, 0.0
    until = after[: after.index(resumed) + 1]
    imports = sum(seconds_of(each.ready or each.end) - seconds_of(each.start) for each in until)
    return seconds_of(resumed.first_step) - harmed_at - imports, imports


def _finish(training: subprocess.Popen[str]) -> None:
    try:
        code = training.wait(LONGEST)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"the run has not ended within {LONGEST:g} s") from None
    if code:
        raise RuntimeError(f"exit code {code}")


def _end(training: subprocess.Popen[str]) -> None:
    """Kill what is left of a run."""
    if training.poll() is None:
        left = psutil.Process(training.pid).children(recursive=True)
        for each in (psutil.Process(training.pid), *left):
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        training.wait()
