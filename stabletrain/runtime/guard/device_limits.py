"""Limits evaluated on the device: the same as `Limits.clip` and `Limits.skips_step`, without a read by the host.

Host and device both compare thresholds as norms in float64, so they make the same decision to the last bit; only the
norm that a logarithmic bound scales to may differ in its last digit.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from stabletrain.core.limits import Bound, Limits, SkipAbove, SkipBelow, SkipNonFinite


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
    """Apply limits to the signals of a step, all of them 0-d tensors on one device.

    The host starts each operation, which takes it longer than the device needs: so thresholds are numbers of the host,
    and nothing is computed that these limits do not need.
    """
    norm = grad_norm.double()
    held = norm if transformed_norm is grad_norm else transformed_norm.double()
    return DeviceDecision(_grad_scale(limits, held).float(), _dropped(limits, loss.double(), norm).float())


def _grad_scale(limits: Limits, norm: Tensor) -> Tensor:
    if not limits.applied_bounds:
        return torch.ones((), dtype=torch.float64, device=norm.device)
    norm = torch.where(norm < math.inf, norm, 0.0)  # what is not finite is above no threshold
    scales = [
        torch.where(norm > max(bound.threshold, 0.0), norm / _clipped(bound, norm), 1.0)
        for bound in limits.applied_bounds
    ]
    return functools.reduce(torch.maximum, scales).clamp_min(1.0)


def _clipped(bound: Bound, norm: Tensor) -> Tensor | float:
    """What a norm above the threshold of a bound is clipped to."""
    if not bound.pull > 0:
        return bound.clip(sys.float_info.max)
    gap = ((norm.log() if bound.log else norm) - bound.centre).clamp_min(0.0)
    target = bound.target + bound.pull / gap
    return (target.exp() if bound.log else target).clamp_min(0.0)


def _dropped(limits: Limits, loss: Tensor, grad_norm: Tensor) -> Tensor:
    drops_nonfinite = any(isinstance(c, SkipNonFinite) for c in limits.skips)
    # a difference is 0 for a finite number, else NaN, which differs from everything
    conditions = [(loss - loss) != (grad_norm - grad_norm)] if drops_nonfinite else []
    for signal, value in (("loss", loss), ("grad_norm", grad_norm)):
        above = [c.above for c in limits.skips if isinstance(c, SkipAbove) and c.signal == signal]
        if above := [each for each in above if not math.isnan(each)]:
            conditions.append(value > min(above) if drops_nonfinite else (value > min(above)) & (value < math.inf))
    below = [c.below for c in limits.skips if isinstance(c, SkipBelow) and not math.isnan(c.below)]
    if below:
        conditions.append(loss < max(below) if drops_nonfinite else (loss < max(below)) & (loss > -math.inf))
    if not conditions:
        return torch.zeros((), dtype=torch.bool, device=loss.device)
    return functools.reduce(torch.bitwise_or, conditions)
