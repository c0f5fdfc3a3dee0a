"""Gradient accumulation: where a window of micro-batches begins and ends, how many there are, and their losses.

Everything that depends on the size of a window asks `AccumulationWindow`; nothing else reads the Trainer's
``accumulate_grad_batches``.
"""

from __future__ import annotations

import math

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from stabletrain.runtime.internals import trainer as trainer_internals


class AccumulationWindow:
    """The window of micro-batches that share one optimizer step.

    Lightning divides the loss of each micro-batch by the size of the window, also in a shorter last window of an
    epoch, so all micro-batches weigh the same.

    Args:
        trainer: in a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._losses: list[Tensor] = []

    # ---- where windows begin and end --------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Micro-batches in a window now."""
        return self._trainer.accumulate_grad_batches

    def size_in(self, epoch: int) -> int:
        """Micro-batches in a window of an epoch: a GradientAccumulationScheduler may change it between epochs."""
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                return int(callback.get_accumulate_grad_batches(epoch))
        return self.size

    def steps_in(self, epoch: int, batches: float) -> int:
        """Optimizer steps in an epoch of so many batches; its last batch always steps."""
        return math.ceil(batches / self.size_in(epoch))

    @property
    def is_open(self) -> bool:
        """Between batches: gradients of the batches before wait for more before the optimizer steps."""
        return trainer_internals.window_is_open(self._trainer)

    # ---- the losses of the window in progress -----------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether no micro-batch of the window in progress has had a backward pass yet."""
        return not self._losses

    def add(self, loss: Tensor) -> None:
        """Take a micro-batch's loss as Lightning differentiates it: one element, divided by the size of the window."""
        self._losses.append(loss.detach().reshape(()) if loss.ndim else loss.detach())

    def take(self) -> list[Tensor]:
        """The losses of the window, 0-d tensors divided by its size; the next window starts empty."""
        losses, self._losses = self._losses, []
        return losses

    def clear(self) -> None:
        """Forget the losses of the window in progress."""
        self._losses.clear()
