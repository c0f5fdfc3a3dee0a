"""Damaged and changed checkpoints: resuming reads the previous good one, or ends in one message.

A run of a small model with SaveCheckpoints, ResumeExactly and three more plugins makes two checkpoints. The newest is
damaged (`damage`), or changed and sealed anew (`reseal`). Then the run is resumed from the folder with both, and from a
folder with the newest alone. Held means: the older one is read, with a warning that names the newest; or one message
(`UserError`); or, if the change is harmless, the newest itself. Never another exception, never a hang of
`HANG_SECONDS`, no more than `LIMIT_MB` of memory, and no file outside.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from hostile_suite.damage import DAMAGES, FILES, Damage
from hostile_suite.reseal import Change, changes
from hostile_suite.trial import Trial
from stabletrain import ClipZScore, ResumeExactly, Rollback, SaveCheckpoints, ScheduleLR, SkipNonFinite
from stabletrain.errors import UserError
from stabletrain.launch.checkpoint_mismatch import explain_mismatch
from stabletrain.runtime.checkpoints.lightning_io import check_when_reading
from stabletrain.testing.toy import ToyBatches, ToyModule
from stabletrain.testing.trainer import quiet_trainer

LIMIT_MB = 1000
HANG_SECONDS = 30
OLDER, NEWEST = 8, 12


class _Records(logging.Handler):
    """The messages of stabletrain's logger."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


class Bench:
    """The two checkpoints of a run, and a folder in which copies of them are damaged.

    Args:
        root: a folder that does not exist yet.
    """

    def __init__(self, root: Path) -> None:
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        self.source, self.work, self.outside = root / "source", root / "work", root / "outside"
        self.outside.mkdir(parents=True)
        self._fit(None, NEWEST, SaveCheckpoints(folder=self.source, every=OLDER, keep_last=None))
        self.older, self.newest = sorted(self.source.iterdir())

    def try_change(self, change: Change, harmless: bool | None) -> str | None:
        """Apply a change to the newest checkpoint and resume, with an older one and without.

        Args:
            change: what to do.
            harmless: whether the newest must be read (True), must not (False), or may (None).

        Returns:
            What went wrong; None if it held.
        """
        for with_older in (True, False):
            shutil.rmtree(self.work, ignore_errors=True)
            folder = self.work / "checkpoints"
            shutil.copytree(self.source, folder)
            change.apply(folder / self.newest.name)
            if not with_older:
                shutil.rmtree(folder / self.older.name)
            before = sorted(os.listdir(self.outside.parent)), sorted(os.listdir(self.outside))
            problem = self._attempt(folder, with_older, harmless)
            after = sorted(os.listdir(self.outside.parent)), sorted(os.listdir(self.outside))
            if problem is None and before != after:
                problem = "wrote outside"
            if problem is not None:
                return f"{'with' if with_older else 'without'} an older one: {problem}"
        return None

    def _attempt(self, folder: Path, with_older: bool, harmless: bool | None) -> str | None:
        records = _Records()
        logging.getLogger("stabletrain").addHandler(records)
        memory = _peak_mb()
        end, step = "", 0
        try:
            with _alarm(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                step = self._fit(folder, NEWEST + 3)
                end = "resumed"
        except UserError as error:
            end = "refused"
            if "\n" in str(error):
                return f"a message of several lines: {error}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            return f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            logging.getLogger("stabletrain").removeHandler(records)
        if _peak_mb() - memory > LIMIT_MB:
            return f"took {_peak_mb() - memory} MB"
        fell_back = any("is damaged" in each and self.newest.name in each for each in records.messages)
        if harmless and (end == "refused" or fell_back):
            return "an undamaged one was not read"
        if harmless is False and with_older and not (end == "resumed" and fell_back):
            return f"the older one was not read, or nothing was said ({end})"
        if harmless is False and not with_older and end != "refused":
            return f"a damaged one was read, up to step {step}"
        return None

    def _fit(self, resume: Path | None, steps: int, *callbacks: Any) -> int:
        stack = [ResumeExactly(), SkipNonFinite(), ClipZScore(), Rollback(), ScheduleLR("constant", lr_warmup=2)]
        trainer = quiet_trainer(*stack, *callbacks, max_steps=steps, default_root_dir=self.outside)
        if resume is not None:  # as the command line does
            check_when_reading(trainer)
            explain_mismatch(trainer.strategy, str(resume))
        data = DataLoader(ToyBatches(), batch_size=None)
        trainer.fit(ToyModule(), data, ckpt_path=resume and str(resume), weights_only=True if resume else None)
        return trainer.global_step


def damaged(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Try checkpoints whose checksums do not fit: every kind of damage to every file in turn, at random places.

    Args:
        folder: for the checkpoints; made here.
        seed: of the generator.
        count: how many.
    """
    generator = random.Random(seed)
    cases = [(damage, name) for damage in DAMAGES for name in FILES]
    if count < len(cases):
        generator.shuffle(cases)
    bench = Bench(folder)
    for damage, name in islice(cycle(cases), count):

        def apply(copy: Path, damage: Damage = damage, name: str = name) -> None:
            damage(copy, bench.older, name, generator)

        change = Change(f"{damage.__name__} {name}", apply)
        yield _trial("damaged checkpoints", change, bench.try_change(change, _is_harmless(bench, change, generator)))


def resealed(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Try checkpoints with a content that no run writes, and checksums that fit; arguments as for `damaged`."""
    bench = Bench(folder)
    for change in islice(changes(bench.newest, random.Random(seed)), count):
        yield _trial("resealed checkpoints", change, bench.try_change(change, None))


def _trial(kind: str, change: Change, problem: str | None) -> Trial:
    return Trial(kind, change.name, problem or "")


def _is_harmless(bench: Bench, change: Change, generator: random.Random) -> bool | None:
    """Whether the three files stay as they are: an additional file, or zeros over zeros."""
    state = generator.getstate()
    shutil.rmtree(bench.work, ignore_errors=True)
    copy = shutil.copytree(bench.source, bench.work / "checkpoints") / bench.newest.name
    change.apply(copy)
    generator.setstate(state)  # the same damage again in the attempts
    if copy.is_symlink():
        return False
    files = [(copy / name, bench.newest / name) for name in FILES]
    is_file = all(mine.is_file() and not mine.is_symlink() for mine, _ in files)
    return is_file and all(
        mine.stat().st_size == good.stat().st_size and mine.read_bytes() == good.read_bytes() for mine, good in files
    )


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Ends an attempt that hangs, for example on a pipe; only in the main thread."""

    def end(signum: int, frame: Any) -> None:
        raise TimeoutError(f"hung for {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
