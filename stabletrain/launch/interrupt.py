"""Ending a run after a batch, with a checkpoint, when a signal has arrived."""

from __future__ import annotations

import logging
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer

from stabletrain.runtime.checkpoints.newest_file import newest_files
from stabletrain.runtime.checkpoints.preemption import StopBetweenBatches
from stabletrain.runtime.checkpoints.save_now import find_saver, save_now
from stabletrain.runtime.data.uneven import refuse_uneven_training, refuse_uneven_validation
from stabletrain.runtime.signal_watch import Interrupted, SignalWatch

logger = logging.getLogger("stabletrain")

_LOOK_EVERY = 10.0
"""Seconds between two looks whether the run's folder still exists."""


class SaveAndStop(StopBetweenBatches):
    """Save a checkpoint and raise `Interrupted` on all ranks after the batch in which a signal arrived.

    Args:
        watch: the handler of the signals.
        folder: where the checkpoint goes, if no callback saves it.
    """

    def __init__(self, watch: SignalWatch, folder: Path) -> None:
        self.started = False
        self.failed: Callable[[BaseException, str], object] | None = None
        """Called with an exception and where it was, as soon as it has ended the fit, before anything is torn down."""
        self.begins: Callable[[Trainer, Any], object] | None = None
        """Called with the first batch, on all ranks, if they have equally many batches."""
        self.first_batch_done: Callable[[Trainer], object] | None = None
        """Called once, after the first batch."""
        self._watch = watch
        self._folder = folder
        self._look_at = 0.0
        self._identity: tuple[int, int] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become the signal handler again: Lightning installs its own handlers before this hook."""
        first_step = trainer.global_step
        self._identity = _identity(self._folder.parent)
        self._watch.lost = lambda: _lost(trainer, first_step, self._folder)
        self._watch.install()
        self._watch.patient = True
        self.take_over(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that training has begun, if the ranks have equally many batches."""
        refuse_uneven_training(trainer)
        if not self.started and self.begins is not None:
            self.begins(trainer, batch)
        self.started = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse validation loaders of different lengths, if a rank would wait for the others for ever."""
        refuse_uneven_validation(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a signal ends the process at once."""
        self._watch.patient = False
        self._look_for_folder(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if any rank was asked to; say once if somebody has deleted the run's folder."""
        if self.first_batch_done is not None:
            call, self.first_batch_done = self.first_batch_done, None
            call(trainer)
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _LOOK_EVERY
            self._look_for_folder(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """From now on a signal ends the process at once."""
        self._watch.patient = False
        if self.failed is not None:
            self.failed(exception, position_of(trainer))
        super().on_exception(trainer, pl_module, exception)

    @property
    def may_stop(self) -> bool:
        """True from the first training batch on: a validation before it has nothing to save."""
        return self.started

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process has received a signal."""
        return self._watch.received

    def save_and_stop(self, trainer: Trainer) -> NoReturn:
        """Save a checkpoint and raise `Interrupted`; on a rank that received no signal itself, with SIGTERM."""
        signum = self._watch.signum
        path = save_now(trainer, self._folder)
        is_saved = path is not None or not trainer.is_global_zero  # only rank 0 writes
        how = "after a batch, with a checkpoint" if is_saved else "after a batch; the checkpoint could not be written"
        raise Interrupted(signum if signum is not None else signal.SIGTERM, path, how=how, agreed=True)

    def _look_for_folder(self, trainer: Trainer) -> None:
        if self._identity is None or not trainer.is_global_zero or _identity(self._folder.parent) == self._identity:
            return
        self._identity = None
        logger.warning(
            "the run's folder %s has been deleted during the run: training goes on, but what was in it is lost, and "
            "what would be written to it later may be, too",
            self._folder.parent,
        )


def position_of(trainer: Trainer) -> str:
    """Return where a fit is, for messages: ``step 12``, or ``step 12, in validation``.

    Args:
        trainer: of the fit.
    """
    within = ", in validation" if trainer.validating or trainer.sanity_checking else ""
    return f"step {trainer.global_step}{within}"


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder: another one with the same name is not the same; None if there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


_STEP = re.compile(r"step[-=_](\d+)")


def _lost(trainer: Trainer, first_step: int, folder: Path) -> str:
    """What is lost if the run ends now: the steps since the newest checkpoint, as far as its name says its step."""
    saver = find_saver(trainer.checkpoint_callbacks)
    last = getattr(saver, "last", None)
    names = [path.resolve().name for path in newest_files(folder)] + ([Path(last).name] if last else [])
    steps = [int(found[1]) for name in names if (found := _STEP.search(name))]
    lost = trainer.global_step - max([first_step, *(step for step in steps if step <= trainer.global_step)])
    return f"without a checkpoint; steps lost since the last checkpoint: {lost}"
