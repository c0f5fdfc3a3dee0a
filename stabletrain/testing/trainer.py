"""A Trainer for tests: on the CPU, without output and without files that were not requested."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint


def quiet_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Make a Trainer for one process on the CPU without loggers, bars, summaries, sanity checks and checkpoints.

    Args:
        callbacks: its callbacks; checkpoints are enabled if one of them is a ``Checkpoint`` callback.
        options: arguments of the Trainer; they override the defaults above.

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
