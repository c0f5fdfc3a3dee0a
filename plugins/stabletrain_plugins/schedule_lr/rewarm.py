"""A second learning-rate warm-up on top of the module's own scheduler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from stabletrain.core.curves import rewarm_factor
from stabletrain.runtime.internals.temporary_lr import TemporaryLR


class RewarmHooks:
    """Hooks on each optimizer that lower the learning rate during the step, and restore it after the step.

    Many schedulers compute the next learning rate from the one in the parameter groups, so it must not stay lowered.

    Args:
        trainer: its optimizers exist.
        rewarm: returns first step and length of the second warm-up, in applied steps; None: there is none.
    """

    def __init__(self, trainer: Trainer, rewarm: Callable[[], tuple[int, int] | None]) -> None:
        self._trainer, self._rewarm = trainer, rewarm
        self._rates = TemporaryLR()
        self._handles = [
            handle
            for optimizer in trainer.optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._lower),
                optimizer.register_step_post_hook(self._restore),
            )
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _lower(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        rewarm = self._rewarm()
        factor = rewarm_factor(self._trainer.global_step, *rewarm) if rewarm else 1.0
        if factor != 1.0:
            self._rates.scale(optimizer, factor)

    def _restore(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._rates.put_back()
