"""The iteration of torch's Muon, which torch offers within its step only."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def orthogonalized(update: Tensor, group: dict[str, Any]) -> Tensor:
    """Return what torch's Muon subtracts for an update, without the rate: all singular values are about 1; bf16.

    Args:
        update: a whole matrix, not sharded.
        group: a parameter group of ``torch.optim.Muon``, with the iteration's settings.
    """
    from torch.optim._muon import _zeropower_via_newtonschulz  # since torch 2.9

    return _zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])


def adjusted_rate(rate: float, group: dict[str, Any], shape: Any) -> float:
    """Return the learning rate of torch's Muon for a matrix of a shape, by the group's ``adjust_lr_fn``."""
    from torch.optim._muon import _adjust_lr

    return _adjust_lr(rate, group["adjust_lr_fn"], shape)
