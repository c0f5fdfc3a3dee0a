"""Learning rates that are others for one step only: whoever reads or computes with them elsewhere finds them as set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class TemporaryLR:
    """Multiplies the learning rate of every parameter group, and puts back what was there.

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
        self._before: list[tuple[dict[str, Any], Any]] = []

    def scale(self, optimizer: Optimizer, factor: float) -> None:
        """Multiply the rates; those scaled before are put back first.

        Args:
            optimizer: about to make a step.
            factor: on every rate.
        """
        self.put_back()
        for group in optimizer.param_groups:
            rate = group["lr"]
            self._before.append((group, rate.clone() if isinstance(rate, Tensor) else rate))
            _set(group, rate * factor)

    def put_back(self) -> None:
        """The rates are as they were before `scale`; calling it again does nothing."""
        while self._before:
            _set(*self._before.pop())


@torch.no_grad()
def _set(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(rate)  # compiled and fused kernels hold on to the tensor
    else:
        group["lr"] = rate
