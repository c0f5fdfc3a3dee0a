"""A Trainer for tests: on the CPU, showing nothing and writing nothing that was not asked for."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint


def quiet_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Make a Trainer for one process on the CPU, without loggers, bars, summaries, sanity checks and checkpoints.

    Args:
        callbacks: its callbacks; with one of Lightning's kind of checkpoints among them, those are not switched off.
        options: arguments of the Trainer, which win over what is said above.

    >>> quiet_trainer(max_steps=5).max_steps
    5
    """
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(each, Checkpoint) for each in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})
