"""Learning rates that are scaled for one optimizer step only and then restored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class TemporaryLR:
    """Multiplies the learning rate of every parameter group, and restores it.

    Schedulers and loggers, which read the learning rate between steps, then see the original one.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    >>> rates = TemporaryLR()
    >>> rates.scale(optimizer, 0.5)
    >>> optimizer.param_groups[0]["lr"]
    0.25
    >>> rates.put_back()
    >>> optimizer.param_groups[0]["lr"]
    0.5
    """

    def __init__(self) -> None:
        self._originals: list[tuple[dict[str, Any], Any]] = []

    def scale(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply the learning rates; an earlier `scale` is undone first.

        Args:
            optimizer: the optimizer whose step is called next.
            factor: for every learning rate.
        """
        self.put_back()
        for group in optimizer.param_groups:
            lr = group["lr"]
            self._originals.append((group, lr.clone() if isinstance(lr, Tensor) else lr))
        for group, lr in self._originals:  # all are read first: groups may share one tensor
            _set(group, lr * factor)

    def put_back(self) -> None:
        """Set the learning rates to what they were before `scale`; a second call does nothing."""
        while self._originals:
            _set(*self._originals.pop())


@torch.no_grad()
def _set(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(lr)  # compiled and fused kernels use this tensor object
    else:
        group["lr"] = lr
