"""Ending a run at the end of a batch, with a checkpoint, when a signal has asked for it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer

from stabletrain.launch.signals import Interrupted, SignalWatch
from stabletrain.runtime.checkpoints.preemption import StopBetweenBatches

CHECKPOINT = "interrupted.ckpt"


class SaveAndStop(StopBetweenBatches):
    """Save a checkpoint and raise `Interrupted` after the batch in which a signal arrived, on all ranks alike.

    Args:
        watch: what receives the signals.
        folder: where the checkpoint goes.
    """

    def __init__(self, watch: SignalWatch, folder: Path) -> None:
        self.started = False
        self._watch = watch
        self._folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals back from Lightning, which registers its own handlers before this hook."""
        self._watch.install()
        self._watch.patient = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember that the run is under way."""
        self.started = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop waiting for batches to end."""
        self._watch.patient = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop waiting for batches to end."""
        self._watch.patient = False

    @property
    def may_stop(self) -> bool:
        """From the first training batch on: a validation before it has nothing to save."""
        return self.started

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process has received a signal."""
        return self._watch.received is not None

    def save_and_stop(self, trainer: Trainer) -> NoReturn:
        """Save a checkpoint and raise `Interrupted`; a rank that received no signal itself says SIGTERM."""
        signum = self._watch.received
        raise Interrupted(signum if signum is not None else signal.SIGTERM, self._save(trainer))

    def _save(self, trainer: Trainer) -> str | None:
        """Save through the plugin that keeps checkpoints, if the run has one: its are verified, and counted."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "plugin", None) == "save_checkpoints":
                saved = callback.save(trainer, wait=True)
                return str(saved) if saved else None
        path = self._folder / CHECKPOINT
        trainer.save_checkpoint(path, weights_only=False)
        return str(path)
