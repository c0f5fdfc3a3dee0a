"""A loss that is no number, or so large that 16-bit gradients overflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from stabletrain.chaos.fault import Fault, wrap_training_step


class ScaledLoss(Fault):
    """The loss that ``training_step`` returns is multiplied by a factor; with NaN, its gradients are NaN too.

    Args:
        at_step: first attempted optimizer step that is struck, from 0.
        factor: on the loss; NaN and infinity are factors too.
        steps: how many attempted steps are struck, >= 1.
        rank: the only rank that is struck; None: all.
        once: strike each step once only, also when a rollback or a resumed run comes to it again.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self, at_step: int, factor: float = math.nan, steps: int = 1, rank: int | None = None, once: bool = True
    ) -> None:
        super().__init__(at_step, steps, rank, once)
        self.factor = factor

    def strike(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Say so."""
        self.say(trainer, step, f"loss times {self.factor:g}")

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Wrap the module's ``training_step`` for this micro-batch."""
        self.later(wrap_training_step(module, self._scaled))

    def _scaled(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] * self.factor}
            return None if output is None else output * self.factor

        return training_step
