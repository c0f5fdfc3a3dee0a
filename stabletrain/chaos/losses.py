"""A loss that is not finite, or so large that 16-bit gradients overflow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from stabletrain.chaos.fault import Fault, wrap_training_step


class ScaledLoss(Fault):
    """Multiplies the loss that ``training_step`` returns by a factor; if the factor is NaN, the gradients are NaN, too.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        factor: on the loss; may be NaN or infinite.
        steps: number of attempted steps with the fault, >= 1.
        rank: the only rank with the fault; None: all ranks.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self, at_step: int, factor: float = math.nan, steps: int = 1, rank: int | None = None, once: bool = True
    ) -> None:
        super().__init__(at_step, steps, rank, once)
        self.factor = factor

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log the fault."""
        self.log_fault(trainer, step, f"loss times {self.factor:g}")

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Wrap the module's ``training_step`` for this micro-batch."""
        self.undo_later(wrap_training_step(module, self._scaled))

    def _scaled(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            if isinstance(output, Mapping):
                return {**output, "loss": output["loss"] * self.factor}
            return None if output is None else output * self.factor

        return training_step
