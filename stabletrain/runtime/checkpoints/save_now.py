"""Saving a checkpoint at once, between two batches, in the format of the run's own checkpoint callback."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, TypeGuard

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Checkpoint

from stabletrain.runtime.records.run_files import INTERRUPTED_CHECKPOINT


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


def save_now(trainer: Trainer, folder: Path) -> str | None:
    """Save a checkpoint, through the first callback that can; called on all ranks, between batches.

    Args:
        trainer: in a fit.
        folder: where the checkpoint goes, if no callback saves it.

    Returns:
        Its path; None if it is not on disk, and on ranks other than 0 if a callback saves it.
    """
    callback = find_saver(trainer.checkpoint_callbacks)
    if callback is not None:
        saved = callback.save(trainer, wait=True)
        return str(saved) if saved else None
    path = folder / INTERRUPTED_CHECKPOINT
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
