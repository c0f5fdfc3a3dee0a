"""A second warm-up on top of a scheduler that is not ours: the rate is lowered inside the step, and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from stabletrain.core.curves import rewarm_factor
from stabletrain.runtime.internals.temporary_lr import TemporaryLR


class RewarmHooks:
    """Many schedulers compute a rate from the one before: what they find in the parameter groups must stay theirs.

    Args:
        trainer: whose optimizers exist.
        rewarm: gives start and length of the climb in applied steps; None: there is none.
    """

    def __init__(self, trainer: Trainer, rewarm: Callable[[], tuple[int, int] | None]) -> None:
        self._trainer, self._rewarm = trainer, rewarm
        self._rates = TemporaryLR()
        self._handles = [
            handle
            for optimizer in trainer.optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._lower),
                optimizer.register_step_post_hook(self._put_back),
            )
        ]

    def undo(self) -> None:
        """Leave the optimizers alone."""
        for handle in self._handles:
            handle.remove()

    def _lower(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        climb = self._rewarm()
        factor = rewarm_factor(self._trainer.global_step, *climb) if climb else 1.0
        if factor != 1.0:
            self._rates.scale(optimizer, factor)

    def _put_back(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._rates.put_back()
