"""Limits evaluated on the device: the same as `Limits.clip` and `Limits.skips_step`, without a read by the host.

Host and device both compare thresholds as norms in float64, so they make the same decision to the last bit; only the
norm that a logarithmic bound scales to may differ in its last digit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stabletrain.core.limits import Limits, SkipAbove, SkipBelow, SkipNonFinite


class DeviceDecision(NamedTuple):
    """Arguments of a fused optimizer kernel.

    Args:
        grad_scale: 0-d float32, the kernel divides the gradient by it; at least 1.
        dropped: 0-d float32, 1 to drop the step, else 0.
    """

    grad_scale: Tensor
    dropped: Tensor

    def or_if(self, condition: Tensor, other: DeviceDecision) -> DeviceDecision:
        """This decision, or another one if a 0-d bool on the device is true."""
        return DeviceDecision(*(torch.where(condition, b, a) for a, b in zip(self, other, strict=True)))

    def or_drop(self, condition: Tensor) -> DeviceDecision:
        """This decision, or to drop the step if a 0-d bool on the device is true."""
        return self._replace(dropped=torch.maximum(self.dropped, condition.float()))


def decide(limits: Limits, loss: Tensor, grad_norm: Tensor, transformed_norm: Tensor) -> DeviceDecision:
    """Apply limits to the signals of a step, all of them 0-d tensors on one device."""
    loss, grad_norm, norm = loss.double(), grad_norm.double(), transformed_norm.double()
    return DeviceDecision(_grad_scale(limits, norm).float(), _dropped(limits, loss, grad_norm).float())


def _grad_scale(limits: Limits, norm: Tensor) -> Tensor:
    if not limits.applied_bounds:
        return torch.ones((), dtype=torch.float64, device=norm.device)
    rows = [(b.threshold, b.target, b.pull, b.centre, float(b.log)) for b in limits.applied_bounds]
    threshold, target, pull, centre, log = _upload(rows, norm.device).unbind(1)
    in_log = log > 0
    s = torch.where(in_log, norm.log(), norm)
    clipped = target + torch.where(pull > 0, pull / (s - centre).clamp_min(0.0), 0.0)
    clipped = torch.where(in_log, clipped.exp(), clipped).clamp_min(0.0)
    clipped = torch.where((norm > threshold) & norm.isfinite(), clipped, norm).min()
    return torch.where(clipped < norm, norm / clipped, 1.0)


def _dropped(limits: Limits, loss: Tensor, grad_norm: Tensor) -> Tensor:
    dropped = torch.zeros((), dtype=torch.bool, device=loss.device)
    if any(isinstance(c, SkipNonFinite) for c in limits.skips):
        dropped = ~(loss.isfinite() & grad_norm.isfinite())
    above = [c for c in limits.skips if isinstance(c, SkipAbove)]
    if above:
        values = torch.stack([loss if c.signal == "loss" else grad_norm for c in above])
        thresholds = _upload([(c.above,) for c in above], loss.device).squeeze(1)
        dropped = dropped | ((values > thresholds) & values.isfinite()).any()
    below = [c.below for c in limits.skips if isinstance(c, SkipBelow) and not math.isnan(c.below)]
    if below:
        dropped = dropped | ((loss < max(below)) & loss.isfinite())
    return dropped


def _upload(rows: Sequence[tuple[float, ...]], device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.float64)
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)
