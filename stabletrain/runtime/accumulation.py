"""Gradient accumulation: where a window of micro-batches begins and ends, how many there are, and their losses.

All code that depends on the size of a window uses `AccumulationWindow`; only this module reads the Trainer's
``accumulate_grad_batches``.
"""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor

from stabletrain.core.accumulation_plan import Plan, steps_in_epochs
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.packages import both


class AccumulationWindow:
    """The window of micro-batches that share one optimizer step.

    Lightning divides the loss of each micro-batch by the size of the window, also in a shorter last window of an
    epoch, so all micro-batches have the same weight.

    Args:
        trainer: in a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._losses: list[Tensor] = []
        self.held = 0
        """Number of micro-batches of the window in progress that had a backward pass; on all ranks the same."""
        self.weights: list[float] = []
        """The weights of the micro-batches with a loss, where they have their own; see `StepGuard`."""
        self.is_started = False
        """Whether the buffers were copied for the window in progress."""
        self.lacks_loss = False
        """Whether the window in progress has to be dropped, because one of them had no loss on this rank."""

    # ---- where windows begin and end --------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Number of micro-batches in a window, in the current epoch."""
        return self._trainer.accumulate_grad_batches

    def size_in(self, epoch: int) -> int:
        """Number of micro-batches in a window of an epoch; a GradientAccumulationScheduler may change it."""
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, both(GradientAccumulationScheduler)):
                return int(callback.get_accumulate_grad_batches(epoch))
        return self.size

    @property
    def largest(self) -> int:
        """Number of micro-batches in a window, in the epoch that has most."""
        sizes = [self.size]
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, both(GradientAccumulationScheduler)):
                sizes += callback.scheduling.values()
        return max([*sizes, *(stage.size for stage in self.plan or ())])

    @property
    def plan(self) -> Plan | None:
        """The sizes of windows that a plugin has planned (`PlannedWindows`); None: there is none."""
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            planned = getattr(callback, "window_plan", None)
            if callable(planned):
                found: Plan | None = planned(self._trainer)
                return found
        return None

    def steps_in(self, epoch: int, batches: float) -> int:
        """Number of optimizer steps in an epoch of ``batches`` batches; the optimizer also steps after the last one."""
        return math.ceil(batches / self.size_in(epoch))

    def steps_in_epochs(self, epochs: int, batches: float) -> list[int]:
        """Number of optimizer steps in each of the first epochs, of ``batches`` batches each."""
        if (plan := self.plan) is not None:
            return steps_in_epochs(plan, [int(batches)] * epochs)
        return [self.steps_in(epoch, batches) for epoch in range(epochs)]

    @property
    def is_open(self) -> bool:
        """Between two batches: whether gradients are accumulated for which the optimizer has not stepped yet."""
        return trainer_internals.window_is_open(self._trainer)

    # ---- the losses of the window in progress -----------------------------------------------------------------------

    @property
    def is_empty(self) -> bool:
        """Whether no micro-batch of the window in progress has had a loss yet."""
        return not self._losses

    def add(self, loss: Tensor) -> None:
        """Add a micro-batch's loss, as passed to backward: one element, divided by the size of the window."""
        self._losses.append(loss.detach().reshape(()) if loss.ndim else loss.detach())
        self.held += 1

    def add_without_loss(self, drop: bool) -> None:
        """Add a micro-batch that has no loss on this rank, but a backward pass.

        Args:
            drop: whether the window has to be dropped for it.
        """
        self.held += 1
        self.lacks_loss = self.lacks_loss or drop

    def take(self) -> list[Tensor]:
        """Return the losses of the window, 0-d tensors divided by its size, and start a new one."""
        losses = self._losses
        self.clear()
        return losses

    def mark(self) -> tuple[int, int, int]:
        """The micro-batches so far, for `join` and `cut`."""
        return len(self._losses), self.held, len(self.weights)

    def join(self, mark: tuple[int, int, int]) -> None:
        """What was added since the mark is one micro-batch: its loss is the sum, its weight that of each part."""
        losses, held, weights = mark
        if len(self._losses) > losses + 1:
            self._losses[losses:] = [torch.stack(self._losses[losses:]).sum()]
        self.held = min(self.held, held + 1)
        del self.weights[weights + 1 :]

    def cut(self, mark: tuple[int, int, int]) -> None:
        """Forget what was added since the mark."""
        del self._losses[mark[0] :]
        self.held = mark[1]
        del self.weights[mark[2] :]

    def clear(self) -> None:
        """Forget the window in progress."""
        self._losses, self.held, self.lacks_loss, self.is_started, self.weights = [], 0, False, False, []
