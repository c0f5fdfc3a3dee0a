"""Running statistics of past signals, as immutable values: `add` returns a new value.

A snapshot of a rule's state is therefore a reference and needs no copy. Non-finite numbers are ignored: `add` then
returns the same statistic.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import NamedTuple

MAD_TO_SIGMA = 1.482602218505602
"""Standard deviation of a normal distribution over its median absolute deviation."""


class Ema(NamedTuple):
    """Exponential moving mean and variance.

    The variance is taken around the *updated* mean, ``var <- d * var + (1 - d) * (x - mean)**2``, as in ZClip
    (Kumar et al. 2025, https://arxiv.org/abs/2504.02507).

    >>> Ema(mean=0.0, var=0.0).add(1.0, decay=0.5)
    Ema(mean=0.5, var=0.125)
    """

    mean: float
    var: float

    @property
    def std(self) -> float:
        """Standard deviation, in the unit of the samples."""
        return math.sqrt(self.var)

    def add(self, x: float, decay: float) -> Ema:
        """The statistic with one more sample.

        Args:
            x: the sample; ignored if non-finite.
            decay: weight of the past, in (0, 1).
        """
        if not math.isfinite(x):
            return self
        mean = decay * self.mean + (1.0 - decay) * x
        deviation = x - mean  # squared as a product: ** raises OverflowError where a product becomes infinite
        return Ema(mean, decay * self.var + (1.0 - decay) * deviation * deviation)

    @classmethod
    def from_moments(cls, samples: Iterable[float]) -> Ema:
        """Initialise from the mean and the population variance of samples.

        >>> Ema.from_moments([1.0, 3.0])
        Ema(mean=2.0, var=1.0)
        """
        finite = [x for x in samples if math.isfinite(x)]
        mean = math.fsum(finite) / len(finite)
        return cls(mean, math.fsum((x - mean) * (x - mean) for x in finite) / len(finite))

    @classmethod
    def from_robust(cls, samples: Iterable[float], min_sigma: float = 0.0) -> Ema:
        """Initialise from the median and the scaled median absolute deviation, which a few outliers hardly change.

        Args:
            samples: at least one finite number.
            min_sigma: floor of the standard deviation, in the unit of the samples.
        """
        window = Window().extend(samples)
        sigma = max(min_sigma, MAD_TO_SIGMA * window.mad)
        return cls(window.median, sigma * sigma)


class Window(NamedTuple):
    """The last samples, stored in order of arrival and sorted.

    Adding to a window of n samples costs two copies of n references and a binary search; median, quantile and MAD cost
    at most a binary search.

    >>> w = Window().extend([3.0, 1.0, 2.0, float("nan"), 100.0])
    >>> w.median, w.mad, w.quantile(1.0)
    (2.5, 1.0, 100.0)
    >>> w.add(0.0, size=4).values
    (1.0, 2.0, 100.0, 0.0)
    """

    values: tuple[float, ...] = ()
    ordered: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def add(self, x: float, size: int) -> Window:
        """The window with one more sample; the oldest samples beyond ``size`` are dropped.

        Args:
            x: the sample; ignored if non-finite.
            size: maximum number of samples, at least 1.
        """
        if not math.isfinite(x):
            return self
        values, ordered = self.values, list(self.ordered)  # one list, changed in place, is faster than slices
        for oldest in values[: max(0, len(values) + 1 - size)]:
            del ordered[bisect_left(ordered, oldest)]
        insort(ordered, x)
        return Window((*values[-size + 1 :], x) if size > 1 else (x,), tuple(ordered))

    def extend(self, samples: Iterable[float]) -> Window:
        """The window with more samples; none is dropped, non-finite ones are ignored."""
        values = (*self.values, *(x for x in samples if math.isfinite(x)))
        return Window(values, tuple(sorted(values)))

    def quantile(self, q: float) -> float:
        """Quantile by linear interpolation (numpy's default method).

        Args:
            q: in [0, 1].
        """
        position = q * (len(self.ordered) - 1)
        low = int(position)
        below = self.ordered[low]
        if low == position:
            return below
        above = self.ordered[low + 1]
        # interpolate from the nearer sample, as numpy does, for the same rounding
        fraction = position - low
        step = above - below
        return above - step * (1.0 - fraction) if fraction >= 0.5 else below + step * fraction

    @property
    def median(self) -> float:
        """Middle sample, or the mean of the two middle ones."""
        return self.median_and_mad()[0]

    @property
    def mad(self) -> float:
        """Median absolute deviation from the median (unscaled)."""
        return self.median_and_mad()[1]

    def median_and_mad(self) -> tuple[float, float]:
        """Both, in one pass: they are needed at every step.

        The k + 1 samples nearest to the median are contiguous in sorted order: a binary search finds the first of them,
        and the k-th smallest distance is that of the first or the last.
        """
        ordered = self.ordered
        n = len(ordered)
        k = n // 2
        median = ordered[k] if n % 2 else 0.5 * (ordered[k - 1] + ordered[k])
        low, high = 0, n - 1 - k
        while low < high:
            start = (low + high) // 2
            if median - ordered[start] > ordered[start + k + 1] - median:
                low = start + 1
            else:
                high = start
        below, above = median - ordered[low], ordered[low + k] - median
        if n % 2:
            return median, max(below, above)
        if below > above:
            second = max(median - ordered[low + 1], above)
        else:
            second = max(below, ordered[low + k - 1] - median)
        return median, 0.5 * (max(below, above) + second)


class DelayedWindow(NamedTuple):
    """A window that samples enter ``delay`` samples late, so that a burst is not compared with itself.

    >>> w = DelayedWindow()
    >>> for x in (1.0, 2.0, 3.0):
    ...     w = w.add(x, size=8, delay=2)
    >>> w.window.values, w.waiting
    ((1.0,), (2.0, 3.0))
    """

    waiting: tuple[float, ...] = ()
    window: Window = Window()

    def add(self, x: float, size: int, delay: int) -> DelayedWindow:
        """The delayed window with one more sample.

        Args:
            x: the sample; ignored if non-finite.
            size: maximum number of samples in the window.
            delay: number of newer samples after which a sample enters the window, >= 0.
        """
        waiting, window = self.waiting, self.window
        if not math.isfinite(x):
            return self
        if not (delay or waiting):
            return DelayedWindow((), window.add(x, size))
        waiting = (*waiting, x)
        while len(waiting) > delay:
            window = window.add(waiting[0], size)
            waiting = waiting[1:]
        return DelayedWindow(waiting, window)
