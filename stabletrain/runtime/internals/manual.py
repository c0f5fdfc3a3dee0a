"""The private attributes of Lightning and torch that are used where a module steps its optimizers by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer


def count_as_stepped(optimizer: Optimizer) -> None:
    """Let torch's schedulers take a dropped step for one that was made: they warn if they are stepped before it.

    Does nothing for an optimizer without one, as torch does.
    """
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        optimizer._opt_called = True  # type: ignore[attr-defined]


def before_zero_grad(trainer: Trainer, call: Callable[[Optimizer], None]) -> Callable[[], None]:
    """Call ``call`` before each ``zero_grad`` of an optimizer, also of those that ``self.optimizers()`` returns.

    Returns:
        The function that undoes this.
    """
    owners: list[Any] = [*trainer.optimizers, *trainer.strategy._lightning_optimizers]
    replaced = [owner.__dict__.get("zero_grad") for owner in owners]

    def replace(owner: Any, optimizer: Optimizer) -> None:
        inner = owner.zero_grad

        @functools.wraps(inner)
        def zero_grad(*args: Any, **kwargs: Any) -> None:
            call(optimizer)
            inner(*args, **kwargs)

        owner.__dict__["zero_grad"] = zero_grad

    for owner in owners:
        replace(owner, getattr(owner, "optimizer", owner))

    def undo() -> None:
        for owner, before in zip(owners, replaced, strict=True):
            owner.__dict__.pop("zero_grad", None)
            if before is not None:
                owner.__dict__["zero_grad"] = before

    return undo


def after_manual_step(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` after each ``step`` of an optimizer of ``self.optimizers()``, for a module that steps by hand.

    Returns:
        The function that undoes this.
    """
    loop: Any = trainer.fit_loop.epoch_loop.manual_optimization
    after = loop._on_after_step

    def call_after() -> None:
        after()
        call()

    loop._on_after_step = call_after  # Lightning passes it to its optimizers at every batch

    def undo() -> None:
        loop.__dict__.pop("_on_after_step", None)

    return undo
