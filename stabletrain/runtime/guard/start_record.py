"""Loggers that record how a run begins are shown its first batch."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def show_first_batch(trainer: Trainer, batch: Any) -> None:
    """Call ``record_start(trainer, batch)`` of each logger whose attribute ``records_itself`` is True.

    Args:
        trainer: in ``on_train_batch_start`` of the first batch of a fit.
        batch: that batch.
    """
    for logger in trainer.loggers:
        if getattr(logger, "records_itself", None) is True:
            logger.record_start(trainer, batch)  # type: ignore[attr-defined]
