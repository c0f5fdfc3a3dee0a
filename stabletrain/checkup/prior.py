"""The loss of a call without what a run adds to it, and that of guessing the label frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from stabletrain.runtime.observing.losses import LossCall

_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")


def plain_loss(call: LossCall) -> float | None:
    """The mean loss of a call, without weights and label smoothing; None for functions other than those of `Prior`.

    Args:
        call: of a loss function.
    """
    x, y = call.input.float(), call.target
    try:
        if call.name == "cross_entropy" and not y.is_floating_point():
            return float(F.cross_entropy(x, y, ignore_index=call.arguments["ignore_index"]))
        if call.name == "nll_loss":
            return float(F.nll_loss(x, y, ignore_index=call.arguments["ignore_index"]))
        if call.name in _BINARY:
            return float(getattr(F, call.name)(x, y.float()))
        if call.name == "mse_loss" and x.shape == y.shape:
            return float(F.mse_loss(x, y.float()))
    except (RuntimeError, IndexError, ValueError):  # arguments that the call itself did not accept
        return None
    return None


class Prior:
    """The targets of the first loss call of each step, and the loss of the best guess that ignores the input."""

    def __init__(self) -> None:
        self._name = ""
        self._counts: Tensor | None = None
        self._sums = torch.zeros(3, dtype=torch.float64)

    def add(self, call: LossCall) -> None:
        """Count the targets of one call.

        Args:
            call: of the same function as the first one that was added; others are left out.
        """
        self._name = self._name or call.name
        y = call.target.detach()
        if call.name != self._name:
            return
        if call.name in ("cross_entropy", "nll_loss") and not y.is_floating_point() and call.input.ndim:
            classes = call.input.shape[1 if call.input.ndim > 1 else 0]
            flat = y.flatten()
            inside = flat[(flat >= 0) & (flat < classes) & (flat != call.arguments["ignore_index"])]
            counts = torch.bincount(inside, minlength=classes).double().cpu()
            self._counts = counts if self._counts is None else self._counts + counts
        elif call.name in (*_BINARY, "mse_loss"):
            values = y.double()
            self._sums += torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()]).cpu()

    @property
    def loss(self) -> float | None:
        """In the unit of `plain_loss`; None: not known."""
        if self._counts is not None and float(self._counts.sum()) > 0:
            share = self._counts / self._counts.sum()
            share = share[share > 0]
            return -float((share * share.log()).sum())
        count, total, squares = map(float, self._sums.tolist())
        if not count:
            return None
        mean = total / count
        if self._name == "mse_loss":
            return max(0.0, squares / count - mean * mean)
        if not 0 <= mean <= 1:
            return None
        return -sum(p * math.log(p) for p in (mean, 1 - mean) if p > 0)
