"""The closure of a micro-batch in Lightning's loop, in parts, so that it can be run in pieces or again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from stabletrain.runtime.internals.loader import override


class MicroBatch:
    """Forward and backward pass of one batch.

    Args:
        trainer: in a fit with automatic optimization.
        kwargs: Lightning's arguments of ``training_step``.
        closure: Lightning's, of which the parts are taken.
    """

    def __init__(self, trainer: Trainer, kwargs: Any, closure: Any) -> None:
        self._trainer, self._kwargs, self._closure = trainer, kwargs, closure

    @property
    def batch(self) -> Any:
        """The batch, as ``training_step`` gets it."""
        return self._kwargs["batch"]

    @property
    def has_batch(self) -> bool:
        """Whether there is a batch, and not an iterator over the loader."""
        return "batch" in self._kwargs

    @property
    def starts_window(self) -> bool:
        """Whether gradients are set to zero before its backward pass."""
        return self._closure._zero_grad_fn is not None

    @property
    def ends_window(self) -> bool:
        """Whether the optimizer steps after it."""
        return not self._trainer.fit_loop._should_accumulate()

    def forward(self, batch: Any) -> Any:
        """Lightning's result of ``training_step``; its ``closure_loss`` is divided by the size of the window."""
        kwargs = type(self._kwargs)(self._kwargs)
        kwargs["batch"] = batch
        return self._trainer.fit_loop.epoch_loop.automatic_optimization._training_step(kwargs)

    def zero_grad(self) -> None:
        """Set the gradients to zero, at the start of a window."""
        if self._closure._zero_grad_fn is not None:
            self._closure._zero_grad_fn()

    def backward(self, loss: Tensor) -> None:
        """Lightning's backward pass, with all hooks."""
        if self._closure._backward_fn is not None:
            self._closure._backward_fn(loss)

    def run(self) -> Any:
        """What Lightning would have done."""
        return type(self._closure).closure(self._closure)

    def without_collectives(self) -> contextlib.AbstractContextManager[None]:
        """Within it DistributedDataParallel does not average gradients."""
        block: Any = getattr(self._trainer.strategy, "block_backward_sync", contextlib.nullcontext)
        return block()  # type: ignore[no-any-return]


def around_micro_batches(trainer: Trainer, run: Callable[[MicroBatch], Any]) -> Callable[[], None]:
    """Call ``run`` for each micro-batch; it returns Lightning's result. Returns the function that undoes this."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    make = loop._make_closure

    def made(kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
        closure = make(kwargs, optimizer, batch_idx)
        part = MicroBatch(trainer, kwargs, closure)
        closure.closure = torch.enable_grad()(lambda *_, **__: run(part))  # type: ignore[method-assign]
        return closure

    return override(loop, "_make_closure", made)


@contextlib.contextmanager
def not_logging(module: LightningModule) -> Iterator[None]:
    """Within it ``self.log`` and ``self.log_dict`` of the module do nothing."""
    undo = [override(module, name, lambda *_, **__: None) for name in ("log", "log_dict")]
    try:
        yield
    finally:
        for each in undo:
            each()
