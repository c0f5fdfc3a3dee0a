"""The weights that a checkpoint gets, which Lightning asks for in a private method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer


def change_saved_weights(trainer: Trainer, change: Callable[[Callable[[], Any]], Any]) -> Callable[[], None]:
    """Call ``change(collect)`` where Lightning collects the weights of a checkpoint, also of one of weights only.

    Args:
        trainer: whose checkpoints are meant.
        change: calls ``collect`` and returns the weights.

    Returns:
        The function that undoes this.
    """
    connector = trainer._checkpoint_connector
    collect = connector._get_lightning_module_state_dict
    connector.__dict__["_get_lightning_module_state_dict"] = lambda: change(collect)

    def undo() -> None:
        connector.__dict__.pop("_get_lightning_module_state_dict", None)

    return undo
