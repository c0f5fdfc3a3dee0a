"""Accumulation windows that may have another size at each step; in Lightning's loop they have one in an epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from stabletrain.runtime.internals.loader import override
from stabletrain.runtime.internals.trainer import skips_backward


class WindowControl:
    """Decides, in place of Lightning, where accumulation windows end and gradients are set to zero.

    Lightning takes both from ``batch_idx``, so that after a change within an epoch a window begins with the gradients
    of the last one. Here a window begins with the batch after the last one's end, whatever its size.

    Args:
        trainer: in a fit.
        size: called at the beginning of each window: the number of its micro-batches.
        saved: what `state` returned in the run that is resumed.
    """

    def __init__(self, trainer: Trainer, size: Callable[[], int], saved: Sequence[int] | None = None) -> None:
        self._trainer, self._size = trainer, size
        loop = trainer.fit_loop.epoch_loop
        self._counts: Any = loop.batch_progress.current
        self._start, self._begun, self._of = saved or (0, 0, 0)
        self._resumed = saved is not None
        self._epoch: int | None = None
        self._is_zero = False
        automatic = loop.automatic_optimization
        self._make_zero_grad = automatic._make_zero_grad_fn
        self._reached = loop._accumulated_batches_reached
        self._count = loop.batch_progress.increment_ready
        self._before = trainer.accumulate_grad_batches
        self._undo = [
            override(loop.batch_progress, "increment_ready", self._start_batch),
            override(loop, "_accumulated_batches_reached", self._is_complete),
            override(automatic, "_make_zero_grad_fn", self._zero_grad),
        ]

    def state(self) -> list[int]:
        """Batches in the epoch before the window in progress, or the last one; how many it has, and will have."""
        return [self._start, self._begun, self._of]

    def end_window(self) -> None:
        """The next batch begins a window."""
        self._begun = self._of

    def undo(self) -> None:
        """Leave it to Lightning."""
        while self._undo:
            self._undo.pop()()
        self._trainer.accumulate_grad_batches = self._before

    def _start_batch(self) -> None:
        """In place of ``increment_ready``: a batch was fetched, and nothing has been called for it."""
        before, epoch = self._counts.ready, self._trainer.current_epoch
        goes_on = before > self._start if self._resumed else epoch == self._epoch
        self._resumed, self._epoch = False, epoch
        self._count()
        if self._begun < self._of and goes_on:
            self._begun += 1
            return
        self._start, self._begun, self._of, self._is_zero = before, 1, self._size(), False
        if not skips_backward(self._trainer):
            self._trainer.accumulate_grad_batches = self._of

    def _is_complete(self) -> bool:
        if skips_backward(self._trainer):
            return self._reached()
        return self._begun >= self._of or (self._resumed and self._counts.ready <= self._start)

    def _zero_grad(self, batch_idx: int, optimizer: Optimizer) -> Callable[[], None] | None:
        if skips_backward(self._trainer):
            return self._make_zero_grad(batch_idx, optimizer)
        if self._is_zero:
            return None
        self._is_zero = True
        size, self._trainer.accumulate_grad_batches = self._trainer.accumulate_grad_batches, 1
        try:
            return self._make_zero_grad(batch_idx, optimizer)
        finally:
            self._trainer.accumulate_grad_batches = size
