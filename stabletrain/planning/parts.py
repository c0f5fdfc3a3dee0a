"""What a plan is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningDataModule, LightningModule


class Parts(NamedTuple):
    """The parts of a run, built.

    Args:
        module: to train.
        data: its data module.
        arguments: of the Trainer, with ``devices`` and ``num_nodes``.
        plugins: the callbacks, by their config keys.
    """

    module: LightningModule
    data: LightningDataModule
    arguments: Mapping[str, Any]
    plugins: Sequence[tuple[str, Callback]]
