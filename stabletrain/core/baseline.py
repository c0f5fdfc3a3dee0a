"""What a signal usually is: centre, spread and upper limit of its recent, accepted past.

The past may be a delayed window, so that a slow beginning of trouble is not its own yardstick; centre and spread are
median and scaled MAD, so that what slipped in cannot widen them; the spread has a floor, so that a very quiet past does
not make an outlier of the first ripple; and where the past has a long tail, the limit lies beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from stabletrain.core.statistics import MAD_TO_SIGMA, DelayedWindow, Window

_LARGEST_EXPONENT = 700.0
"""exp() of more than this is no float."""
_TAIL, _TAIL_SIGMAS = 0.98, 1.7
"""A quantile of the loss, and how many spreads above the centre it counts for. In a normal distribution it lies 2.05
above: the estimate from a window of 128 is noisy, and a limit that is too near drops healthy steps."""


class Baseline(NamedTuple):
    """The past of one signal, and what follows from it, in the space in which a `OutlierTest` judges it.

    Args:
        past: accepted values; of a signal judged in log space, their logarithms.
        centre: their median.
        limit: above it lies an outlier; None while too little is known.
        least_sigma: floor of the spread while a level learned anew has few values; 0 if it is not new.
    """

    past: DelayedWindow = DelayedWindow()
    centre: float = 0.0
    limit: float | None = None
    least_sigma: float = 0.0


class OutlierTest(NamedTuple):
    """How a signal is judged; a `Baseline` is what it is judged by.

    In log space the limit is ``m + z * s`` with median ``m`` and scaled MAD ``s`` of the logarithms. In linear space
    it is the highest of three: the same of the values; the limit of a log-normal signal,
    ``m * (q / m) ** (1.4826 * z)`` with the upper quartile ``q``; and that of a signal whose spread is not always the
    same, such as the loss of batches of very different sizes, ``m + z * (t - m) / 1.7`` with the 98th percentile ``t``.

    Args:
        z_threshold: spreads above the centre at which outliers begin, > 0.
        window: most values of the past, >= 2.
        delay: steps that an accepted value waits before it counts, >= 0.
        min_samples: values in the window before anything is judged, 2 to ``window``.
        min_sigma: floor of the spread: in log space absolute (nats), > 0; else as a share of the centre, >= 0.
        log: judge the logarithm; zero and negative values are then neither judged nor learned.
        robust: median and MAD; else mean and standard deviation (of n - 1), and the first limit alone.

    >>> gauge = OutlierTest(z_threshold=6.0, window=8, delay=0, min_samples=4, min_sigma=0.05, log=True)
    >>> baseline = Baseline()
    >>> for norm in (1.0, 1.1, 0.9, 1.0):
    ...     baseline = gauge.learn(baseline, norm)
    >>> gauge.is_outlier(baseline, 1.2), gauge.is_outlier(baseline, 12.0)
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
        """With one more accepted value."""
        if self.log and not value > 0.0:
            return baseline
        past = baseline.past.add(math.log(value) if self.log else value, self.window, self.delay)
        if past.window is baseline.past.window:  # the value only waits
            return Baseline(past, baseline.centre, baseline.limit, baseline.least_sigma)
        return self._judged(past, baseline.least_sigma)

    def relearn(self, baseline: Baseline, values: Iterable[float]) -> Baseline:
        """A new level, judged by at once; until it has enough values it keeps at least the old one's spread.

        Args:
            baseline: the old level.
            values: of the new level, at least one that can be learned.
        """
        inside = [self._to_space(value) for value in values if value > 0.0 or not self.log]
        least = max(self._centre_and_sigma(baseline.past.window)[1], baseline.least_sigma)
        return self._judged(DelayedWindow(window=Window().extend(inside[-self.window :])), least)

    def is_outlier(self, baseline: Baseline, value: float) -> bool:
        """Whether a value lies above the limit."""
        return baseline.limit is not None and self._to_space(value) > baseline.limit

    def is_raised(self, baseline: Baseline, value: float) -> bool:
        """Whether a value lies above the middle between centre and limit: no outlier, but no return either."""
        return baseline.limit is not None and self._to_space(value) > 0.5 * (baseline.centre + baseline.limit)

    def limit(self, baseline: Baseline) -> float:
        """The limit in the signal's own unit; infinite while there is none."""
        return math.inf if baseline.limit is None else self._from_space(baseline.limit)

    def centre(self, baseline: Baseline) -> float:
        """The centre in the signal's own unit."""
        return self._from_space(baseline.centre)

    def _judged(self, past: DelayedWindow, least_sigma: float) -> Baseline:
        window = past.window
        if len(window) >= self.min_samples:
            least_sigma = 0.0
        elif not least_sigma:
            return Baseline(past)
        centre, sigma = self._centre_and_sigma(window)
        sigma = max(sigma, least_sigma)
        if sigma == 0.0 and (self.robust or centre == 0.0):
            return Baseline(past, centre)  # there is no scale to judge by
        limit = centre + self.z_threshold * sigma
        if self.robust and not self.log:
            ordered, last = window.ordered, len(window) - 1  # samples, not between samples: that could overflow
            limit = max(limit, centre + self.z_threshold / _TAIL_SIGMAS * (ordered[math.ceil(_TAIL * last)] - centre))
            if 0.0 < centre < math.inf:
                reach = self.z_threshold * MAD_TO_SIGMA * math.log(ordered[math.ceil(0.75 * last)] / centre)
                limit = max(limit, math.exp(min(math.log(centre) + reach, _LARGEST_EXPONENT)))
        if not math.isfinite(limit):  # the largest floats: nothing can be said of them
            return Baseline(past, least_sigma=least_sigma)
        return Baseline(past, centre, limit, least_sigma)

    def _centre_and_sigma(self, window: Window) -> tuple[float, float]:
        if self.robust:
            centre, sigma = window.median, MAD_TO_SIGMA * window.mad
        elif window.ordered[0] == window.ordered[-1]:
            centre, sigma = window.ordered[0], 0.0  # not a rounding error of the mean
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
