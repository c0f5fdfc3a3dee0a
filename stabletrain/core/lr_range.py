"""Learning-rate range test: when it ends, and which rates it suggests. Standard library only.

References: Smith 2017, "Cyclical learning rates for training neural networks", https://arxiv.org/abs/1506.01186.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, median
from typing import NamedTuple

from stabletrain.core.statistics import MAD_TO_SIGMA

FEWEST_STEPS = 20
"""Steps of a range test, at least: below that there is nothing to smooth over."""
_TIMES_BEST = 4.0
_LEAST_RISE = 0.1
"""Of the fall so far, which a rise must exceed: four times a loss near 0 may be noise."""
_NON_FINITE_IN_A_ROW = 5
_NOISE = 3.0
_SHARE = 0.02
"""Of the fall, which the loss must have risen again by for the minimum to be one."""


class RangePoint(NamedTuple):
    """One attempted step.

    Args:
        rate: learning rate of the step.
        loss: of the step, before its update.
    """

    rate: float
    loss: float


@dataclass(frozen=True)
class Rising:
    """A curve that grows by the same factor from step to step, and stays at its end; a `stabletrain.core.curves.Curve`.

    Args:
        first: the factor of the first step, > 0.
        last: the factor of the last step, > 0.
        steps: >= 2.

    >>> [round(Rising(0.01, 1.0, 3).factor(step), 2) for step in range(4)]
    [0.01, 0.1, 1.0, 1.0]
    """

    first: float
    last: float
    steps: int

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        progress = min(step / (self.steps - 1), 1.0)
        return math.exp((1.0 - progress) * math.log(self.first) + progress * math.log(self.last))


class RangeEnd:
    """Whether a range test has seen enough: the smoothed loss is above four times its best, or losses are not finite.

    A running mean of running medians, so that a single high loss ends nothing. A smoothed loss that is near 0 or
    negative must also have risen by a tenth of its fall.

    Args:
        steps: planned length of the test.
    """

    def __init__(self, steps: int) -> None:
        self._decay = 1.0 - min(1.0, 20.0 / steps)
        self._mean = self._weight = 0.0
        self._first: float | None = None
        self._best = math.inf
        self._last: deque[float] = deque(maxlen=5)
        self._non_finite = 0

    def add(self, loss: float) -> bool:
        """Add the loss of an attempted step, and return whether the test is over.

        Args:
            loss: may be NaN or infinite.
        """
        if not math.isfinite(loss):
            self._non_finite += 1
            return self._non_finite >= _NON_FINITE_IN_A_ROW
        self._non_finite = 0
        self._last.append(loss)
        self._mean = self._decay * self._mean + (1.0 - self._decay) * median(self._last)
        self._weight = self._decay * self._weight + (1.0 - self._decay)
        smoothed = self._mean / self._weight
        self._first = smoothed if self._first is None else self._first
        self._best = min(self._best, smoothed)
        rise = max((_TIMES_BEST - 1.0) * abs(self._best), _LEAST_RISE * (self._first - self._best))
        return smoothed > self._best + rise


@dataclass(frozen=True, kw_only=True)
class RangeResult:
    """What a range test has found.

    Args:
        smoothed: the smoothed curve, a point for each rate, ascending.
        steepest: rate at which the smoothed loss falls fastest per factor of the rate; None if the loss has not
            fallen by more than its noise.
        turning: rate of the lowest smoothed loss; None if the loss had not risen again at the highest rate, or had not
            fallen.
    """

    smoothed: tuple[RangePoint, ...] = ()
    steepest: float | None = None
    turning: float | None = None

    @property
    def below_turning(self) -> float | None:
        """A tenth of the rate at which the loss turns."""
        return None if self.turning is None else self.turning / 10.0


def read_range(points: Sequence[RangePoint]) -> RangeResult:
    """Return what the points of a range test show; those without a finite loss are left out.

    The curve is smoothed over a twentieth of its rates on both sides of each, so that it does not lag behind as a
    running mean does, and the slope is measured over as many: one noisy step decides nothing.

    Args:
        points: in the order of the steps; several may have one rate, which are averaged.

    >>> rates = [10 ** (-4 + 4 * i / 99) for i in range(100)]
    >>> found = read_range([RangePoint(rate, 1 + (math.log10(rate) + 1.5) ** 2) for rate in rates])
    >>> f"{found.turning:.2g}"
    '0.032'
    """
    finite = [point for point in points if math.isfinite(point.loss)]
    raw = [RangePoint(rate, fmean(p.loss for p in group)) for rate, group in groupby(finite, key=lambda p: p.rate)]
    if len(raw) < FEWEST_STEPS // 2:
        return RangeResult(smoothed=tuple(raw))
    reach = max(1, len(raw) // 20)
    losses = _means(_medians([point.loss for point in raw], reach), reach)
    smoothed = tuple(RangePoint(point.rate, loss) for point, loss in zip(raw, losses, strict=True))
    noise = MAD_TO_SIGMA * median(abs(point.loss - loss) for point, loss in zip(raw, losses, strict=True))
    least = _NOISE * noise / math.sqrt(2 * reach + 1)
    lowest = min(range(len(losses)), key=losses.__getitem__)
    fall = max(losses[: lowest + 1]) - losses[lowest]
    if fall <= least or lowest < reach:
        return RangeResult(smoothed=smoothed)
    middle = range(reach, lowest - reach + 1) or range(lowest, lowest + 1)
    slopes = {i: _slope(smoothed[max(0, i - reach) : i + reach + 1]) for i in middle}
    steepest = smoothed[min(slopes, key=slopes.__getitem__)].rate
    # the last point that is finite may be just before the loss became NaN
    diverged = any(not math.isfinite(point.loss) for point in points[-_NON_FINITE_IN_A_ROW:])
    has_turned = diverged or max(losses[lowest:]) - losses[lowest] > max(least, _SHARE * fall)
    return RangeResult(smoothed=smoothed, steepest=steepest, turning=smoothed[lowest].rate if has_turned else None)


def _medians(values: Sequence[float], reach: int) -> list[float]:
    return [median(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _means(values: Sequence[float], reach: int) -> list[float]:
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def _slope(points: Sequence[RangePoint]) -> float:
    """Least-squares slope of the loss over the logarithm of the rate."""
    xs = [math.log(point.rate) for point in points]
    centre, height = fmean(xs), fmean(point.loss for point in points)
    spread = math.fsum((x - centre) ** 2 for x in xs)
    rise = math.fsum((x - centre) * (point.loss - height) for x, point in zip(xs, points, strict=True))
    return rise / spread if spread else 0.0
