"""Ending a run after a batch, with a checkpoint, when a signal has arrived."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeGuard

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from stabletrain.runtime.checkpoints.preemption import StopBetweenBatches
from stabletrain.runtime.records.run_files import INTERRUPTED_CHECKPOINT
from stabletrain.runtime.signal_watch import Interrupted, SignalWatch


class SavesOnRequest(Protocol):
    """A checkpoint callback (Lightning's ``Checkpoint``) with a method that saves at once.

    A run that is interrupted saves through it, so that the checkpoint has the callback's own format and counts in its
    retention. Without such a callback, the run saves an ordinary Lightning checkpoint.
    """

    def save(self, trainer: Trainer, *, wait: bool) -> Path | None:
        """Save a checkpoint now; called on all ranks, between batches.

        Args:
            trainer: in a fit.
            wait: whether to return only when the checkpoint is on disk.

        Returns:
            Where the checkpoint is; None if it is not on disk, and on ranks other than 0.
        """


class SaveAndStop(StopBetweenBatches):
    """Save a checkpoint and raise `Interrupted` on all ranks after the batch in which a signal arrived.

    Args:
        watch: the handler of the signals.
        folder: where the checkpoint goes, if no callback saves it.
    """

    def __init__(self, watch: SignalWatch, folder: Path) -> None:
        self.started = False
        self._watch = watch
        self._folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Become the signal handler again: Lightning installs its own handlers before this hook."""
        self._watch.install()
        self._watch.patient = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that training has begun."""
        self.started = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on a signal ends the process at once."""
        self._watch.patient = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """From now on a signal ends the process at once."""
        self._watch.patient = False

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
        raise Interrupted(signum if signum is not None else signal.SIGTERM, self._save(trainer))

    def _save(self, trainer: Trainer) -> str | None:
        callback = find_saver(trainer.checkpoint_callbacks)
        if callback is not None:
            saved = callback.save(trainer, wait=True)
            return str(saved) if saved else None
        path = self._folder / INTERRUPTED_CHECKPOINT
        trainer.save_checkpoint(path, weights_only=False)
        return str(path)


def find_saver(callbacks: Iterable[Checkpoint]) -> SavesOnRequest | None:
    """Return the first callback with the method of `SavesOnRequest`; None if there is none.

    Args:
        callbacks: of a Trainer.
    """
    return next((callback for callback in callbacks if _saves_on_request(callback)), None)


def _saves_on_request(callback: object) -> TypeGuard[SavesOnRequest]:
    save = getattr(callback, "save", None)
    return callable(save) and "wait" in inspect.signature(save).parameters
