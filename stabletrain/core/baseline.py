"""Baseline of a signal (centre, spread and upper limit of its recent, accepted values) and the test for outliers.

The window of values may be delayed, so that the first steps of a slow rise do not raise the limit. Centre and spread
are median and scaled MAD, which a few undetected outliers hardly change. The spread has a floor, so that a small change
after a nearly constant signal is not an outlier; for a loss it is also a share of the range that its level has covered
in the run, so that near zero the loss is not judged by the size of its rounding errors. For a loss with a long tail the
limit lies beyond the tail.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from stabletrain.core.statistics import MAD_TO_SIGMA, DelayedWindow, Window

_LARGEST_EXPONENT = 700.0
"""exp() of more than about 709 overflows."""
_TAIL, _TAIL_SIGMAS = 0.98, 1.7
"""A quantile of the loss, and its assumed distance above the centre in standard deviations. In a normal distribution
the distance is 2.05; 1.7 allows for the error of a quantile of 128 values: a limit that is too low drops healthy
steps."""
_ROUNDING = 1e-5
"""A loss smaller than this share of the gradient norm is rounding noise about zero, such as a policy-gradient loss of
normalized advantages: the gradient of a loss L of curvature c is at most sqrt(2 c L), so a real loss is larger."""
_RANGE_SHARE = 0.001
"""Floor of the loss's spread, as a share of the range that its centre has covered since the start of the run."""


class Baseline(NamedTuple):
    """Accepted values of one signal and their statistics, in the space (linear or log) of an `OutlierTest`.

    Args:
        past: the accepted values; for a test in log space their logarithms.
        centre: their median, or their mean where the test is not robust.
        limit: a value above it is an outlier; None while there are too few values.
        least_sigma: floor of the spread after `OutlierTest.relearn`, until there are ``min_samples`` values; else 0.
        ceiling: the highest limit of an accepted level, up to which values are never outliers; None: no such level.
        size: typical distance of the values from zero: the larger of centre and spread; 0 while there is no limit.
        covered: lowest and highest centre since the start of the run; of a robust test in linear space only.
    """

    past: DelayedWindow = DelayedWindow()
    centre: float = 0.0
    limit: float | None = None
    least_sigma: float = 0.0
    ceiling: float | None = None
    size: float = 0.0
    covered: tuple[float, float] | None = None

    @property
    def raised(self) -> float:
        """The midpoint of centre and limit, above which a value is raised; infinite while there is no limit."""
        return math.inf if self.limit is None else 0.5 * (self.centre + self.limit)


class OutlierTest(NamedTuple):
    """Test whether a value of a signal is an outlier, given the `Baseline` of the signal.

    In log space the limit is ``m + z * s`` with median ``m`` and scaled MAD ``s`` of the logarithms. In linear space
    it is the highest of three: ``m + z * s`` of the values; the limit of a log-normal signal,
    ``m * (q / m) ** (1.4826 * z)`` with the upper quartile ``q``; and, for a signal whose spread varies from step to
    step, such as the loss of batches of very different sizes, ``m + z * (t - m) / 1.7`` with the 98th percentile ``t``.

    Args:
        z_threshold: distance of the limit from the centre, in spreads, > 0.
        window: maximum number of values in the baseline, >= 2.
        delay: steps after which an accepted value enters the window, >= 0.
        min_samples: values in the window from which on there is a limit, 2 to ``window``.
        min_sigma: floor of the spread: in log space absolute (nats), > 0; else as a share of the centre, >= 0.
        log: test the logarithm; zero and negative values are then no outliers and do not enter the baseline.
        robust: use median and MAD; else mean and standard deviation (of n - 1), and only the first of the limits.

    >>> test = OutlierTest(z_threshold=6.0, window=8, delay=0, min_samples=4, min_sigma=0.05, log=True)
    >>> baseline = Baseline()
    >>> for norm in (1.0, 1.1, 0.9, 1.0):
    ...     baseline = test.learn(baseline, norm)
    >>> test.is_outlier(baseline, 1.2), test.is_outlier(baseline, 12.0)
    (False, True)
    """

    z_threshold: float
    window: int
    delay: int
    min_samples: int
    min_sigma: float
    log: bool
    robust: bool = True

    def learn(self, baseline: Baseline, value: float) -> Baseline:
        """The baseline with one more accepted value."""
        if self.log and not value > 0.0:
            return baseline
        past = baseline.past.add(math.log(value) if self.log else value, self.window, self.delay)
        if past.window is baseline.past.window:  # the value is delayed: the statistics do not change
            return baseline._replace(past=past)
        return self._with_limit(baseline, past, baseline.least_sigma)

    def relearn(self, baseline: Baseline, values: Iterable[float]) -> Baseline:
        """A baseline of a new level, with a limit at once.

        Until it has ``min_samples`` values, its spread is at least that of the old baseline. If that is empty, there
        is no limit before.

        Args:
            baseline: the old baseline.
            values: values at the new level; at least one is finite and, in log space, positive.
        """
        new = [self._to_space(value) for value in values if value > 0.0 or not self.log]
        old = baseline.past.window
        least = max(self._centre_and_sigma(old)[1] if old.values else 0.0, baseline.least_sigma)
        return self._with_limit(baseline, DelayedWindow(window=Window().extend(new[-self.window :])), least)

    def accept(self, baseline: Baseline, values: Iterable[float]) -> Baseline:
        """A baseline of a new level that was reached by design: up to its limit, values are never outliers again.

        So a level that is left and reached again, as by tasks that alternate, is accepted once. Without values the
        baseline does not change.
        """
        values = [value for value in values if math.isfinite(value) and (value > 0.0 or not self.log)]
        if not values:
            return baseline
        new = self.relearn(baseline, values)
        return new if new.limit is None else new._replace(ceiling=new.limit)  # which is at least the old ceiling

    def is_outlier(self, baseline: Baseline, value: float) -> bool:
        """Whether a value lies above the limit."""
        return baseline.limit is not None and self._to_space(value) > baseline.limit

    def is_raised(self, baseline: Baseline, value: float) -> bool:
        """Whether a value lies above the midpoint of centre and limit.

        A raised signal that is not an outlier does not end an excursion.
        """
        return self._to_space(value) > baseline.raised

    def limit(self, baseline: Baseline, least_size: float = 0.0) -> float:
        """The limit in the unit of the signal; infinite while there is none.

        Args:
            baseline: of the signal.
            least_size: there is no limit for values that are typically smaller than this.
        """
        if baseline.limit is None or baseline.size < least_size:
            return math.inf
        return self._from_space(baseline.limit)

    def rounding_size(self, baseline: Baseline) -> float:
        """Size below which a loss is rounding noise, where ``baseline`` is that of the gradient norm; 0 if unknown."""
        return 0.0 if baseline.limit is None else _ROUNDING * self.centre(baseline)

    def share_raised(self, baseline: Baseline) -> float:
        """Share of raised values in the later half of the history, 0 to 1; 0 while there is no limit.

        Of a signal that falls, as in the first steps, the earlier half is raised for that reason alone.
        """
        values = baseline.past.window.values
        later = values[len(values) // 2 :]
        return sum(value > baseline.raised for value in later) / len(later) if later else 0.0

    def centre(self, baseline: Baseline) -> float:
        """The centre in the unit of the signal."""
        return self._from_space(baseline.centre)

    def _with_limit(self, old: Baseline, past: DelayedWindow, least_sigma: float) -> Baseline:
        window, covered = past.window, old.covered
        if len(window.ordered) >= self.min_samples:
            least_sigma = 0.0
        elif not least_sigma:
            return Baseline(past, ceiling=old.ceiling, covered=covered)
        centre, sigma = self._centre_and_sigma(window)
        size = max(abs(centre), sigma)
        if least_sigma > sigma:
            sigma = least_sigma
        linear = self.robust and not self.log
        if linear and not least_sigma:
            lowest, highest = covered or (centre, centre)
            if not (covered and lowest <= centre <= highest):
                covered = lowest, highest = min(lowest, centre), max(highest, centre)
            sigma = max(sigma, _RANGE_SHARE * (highest - lowest))
        if sigma == 0.0 and (self.robust or centre == 0.0):
            return Baseline(past, centre, None, 0.0, old.ceiling, size, covered)  # without a spread there is no limit
        z = self.z_threshold
        limit = centre + z * sigma
        if linear:
            ordered, last = window.ordered, len(window.ordered) - 1  # quantiles not interpolated: that could overflow
            limit = max(limit, centre + z / _TAIL_SIGMAS * (ordered[math.ceil(_TAIL * last)] - centre))
            if 0.0 < centre < math.inf:
                above = z * MAD_TO_SIGMA * math.log(ordered[math.ceil(0.75 * last)] / centre)
                limit = max(limit, math.exp(min(math.log(centre) + above, _LARGEST_EXPONENT)))
        if not math.isfinite(limit):  # overflow: values near the largest float
            return Baseline(past, 0.0, None, least_sigma, old.ceiling, 0.0, old.covered)
        limit = limit if old.ceiling is None else max(limit, old.ceiling)
        return Baseline(past, centre, limit, least_sigma, old.ceiling, size, covered)

    def _centre_and_sigma(self, window: Window) -> tuple[float, float]:
        if self.robust:
            centre, mad = window.median_and_mad()
            sigma = MAD_TO_SIGMA * mad
        elif window.ordered[0] == window.ordered[-1]:
            centre, sigma = window.ordered[0], 0.0  # exact: the mean would have a rounding error
        else:
            n = len(window)
            centre = sum(window.values) / n
            sigma = math.dist(window.values, (centre,) * n) / math.sqrt(n - 1)
        return centre, max(sigma, self.min_sigma if self.log else self.min_sigma * abs(centre))

    def _to_space(self, value: float) -> float:
        if not self.log:
            return value
        return math.log(value) if value > 0.0 else -math.inf

    def _from_space(self, s: float) -> float:
        return math.exp(min(s, _LARGEST_EXPONENT)) if self.log else s
