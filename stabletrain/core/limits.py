"""Limits of a step: bounds on the gradient norm, and conditions under which the step is dropped.

Each rule returns `Limits`; the guard joins them with ``|``. The gradient norm is clipped to the *minimum* over all
bounds, and the step is dropped if *any* condition is true. Joining is a set union, so the order of the plugins does not
matter.

This module evaluates limits on the host, in float64; `stabletrain.runtime.guard.device_limits` does so on the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias

Signal: TypeAlias = Literal["loss", "grad_norm"]


class Bound(NamedTuple):
    """An upper limit on the gradient norm ``g``, in a linear or a logarithmic space ``s``.

    A norm with ``s(g) > above`` is clipped to ``target + pull / (s(g) - centre)``, in the same space. This covers a
    fixed norm or a percentile (``target = above``), a z-score (``above = mean + z * std``) and ZClip's reciprocal
    scaling towards the mean (``target = centre = mean``, ``pull = (z * std)**2``). A bound never raises a norm, and
    returns a non-finite norm unchanged: scaling by 0 or infinity would turn the gradient into NaN.

    Args:
        above: threshold, in the space ``s``.
        target: what a norm above the threshold is clipped to, in ``s``.
        pull: weight of the reciprocal term, in ``s`` squared; 0 switches it off.
        centre: pole of the reciprocal term, in ``s``; must be below ``above``.
        log: ``s`` is the natural logarithm; else the norm itself.

    >>> Bound(above=1.0, target=1.0).clip(4.0)
    1.0
    >>> Bound(above=1.0, target=0.5, pull=0.5, centre=0.5).clip(1.5)
    1.0
    >>> Bound(above=0.0, target=0.0, log=True).clip(4.0)
    1.0
    """

    above: float
    target: float
    pull: float = 0.0
    centre: float = 0.0
    log: bool = False

    @property
    def threshold(self) -> float:
        """The threshold as a norm. Host and device compare with this same number, so they take the same decision."""
        return _exp(self.above) if self.log else self.above

    def clip(self, norm: float) -> float:
        """The norm after this bound."""
        if not self.threshold < norm < math.inf:
            return norm
        s = math.log(norm) if self.log else norm
        target = self.target
        if self.pull > 0:
            gap = s - self.centre
            target += self.pull / gap if gap > 0 else math.inf  # rounding in log() may make s equal to the pole
        return min(norm, max(0.0, _exp(target) if self.log else target))


class SkipAbove(NamedTuple):
    """Drop the step when a finite signal exceeds a limit.

    Args:
        signal: ``"loss"`` (nats) or ``"grad_norm"`` (raw: unscaled, before any transform).
        above: the limit, in the signal's own unit.
    """

    signal: Signal
    above: float

    def hits(self, loss: float, grad_norm: float) -> bool:
        """Whether this step is dropped."""
        value = loss if self.signal == "loss" else grad_norm
        return self.above < value < math.inf


class SkipBelow(NamedTuple):
    """Drop the step when the loss is finite and below a limit.

    Args:
        below: the limit, in the loss's unit.
    """

    below: float

    def hits(self, loss: float, grad_norm: float) -> bool:
        """Whether this step is dropped."""
        return -math.inf < loss < self.below


class SkipNonFinite(NamedTuple):
    """Drop the step when its loss or its gradient norm is NaN or infinite."""

    def hits(self, loss: float, grad_norm: float) -> bool:
        """Whether this step is dropped."""
        return not (math.isfinite(loss) and math.isfinite(grad_norm))


SkipCondition: TypeAlias = SkipAbove | SkipBelow | SkipNonFinite


class Limits(NamedTuple):
    """The limits of one step, computed from the steps before it; ``|`` joins them.

    >>> tight, loose = Limits.of(Bound(1.0, 1.0)), Limits.of(Bound(2.0, 2.0))
    >>> (tight | loose).clip(5.0)
    1.0
    >>> (tight | loose) == (loose | tight)
    True
    >>> Limits.of(SkipNonFinite()).skips_step(loss=float("nan"), grad_norm=1.0)
    True
    """

    bounds: frozenset[Bound] = frozenset()
    skips: frozenset[SkipCondition] = frozenset()
    fallback: frozenset[Bound] = frozenset()
    """Bounds that apply only if no rule gives any other: a rule that leaves clipping to others is safe alone."""

    @classmethod
    def of(cls, *parts: Bound | SkipCondition) -> Limits:
        """Limits made of bounds and conditions."""
        return cls(
            frozenset(part for part in parts if isinstance(part, Bound)),
            frozenset(part for part in parts if not isinstance(part, Bound)),
        )

    def __or__(self, other: Limits) -> Limits:
        return Limits(self.bounds | other.bounds, self.skips | other.skips, self.fallback | other.fallback)

    @property
    def applied_bounds(self) -> frozenset[Bound]:
        """The bounds that apply, after all limits have been joined."""
        return self.bounds or self.fallback

    def clip(self, norm: float) -> float:
        """The norm after all bounds that apply: their minimum, and never more than the norm itself."""
        clipped = norm
        for bound in self.applied_bounds:
            held = bound.clip(norm)
            clipped = held if held < clipped else clipped
        return clipped

    def skips_step(self, loss: float, grad_norm: float) -> bool:
        """Whether any condition drops a step with this loss and raw gradient norm."""
        for condition in self.skips:  # noqa: SIM110 (any() with a generator takes three times as long, at every step)
            if condition.hits(loss, grad_norm):
                return True
        return False


NO_LIMITS = Limits()
"""No bounds and no conditions: the identity of ``|``."""
_NOTHING: frozenset[Any] = frozenset()


def join(limits: Iterable[Limits]) -> Limits:
    """The union of many limits."""
    each = list(limits)
    if len(each) == 1:
        return each[0]
    if not each:
        return NO_LIMITS
    return Limits(
        _NOTHING.union(*[limits.bounds for limits in each]),
        _NOTHING.union(*[limits.skips for limits in each]),
        _NOTHING.union(*[limits.fallback for limits in each]),
    )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
