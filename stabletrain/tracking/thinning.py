"""Fewer points of a curve without the loss of an extreme, and its smoothed form, for a page with charts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BUCKETS = 500
"""Buckets of a thinned curve: more than a chart has columns of pixels between two points."""

_SMOOTH_POINTS = 200
_SMOOTH_SHARE = 50


class Curve(NamedTuple):
    """Values by step; arrays of equal length, in ascending order of steps.

    Args:
        step: numbers of attempted steps, >= 0.
        value: may be NaN or infinite.
    """

    step: NDArray[np.int64]
    value: NDArray[np.float64]


def thin(curve: Curve, buckets: int = BUCKETS) -> Curve:
    """Return the first, last, least, greatest and first non-finite point of each of the buckets, in order.

    Buckets hold equally many points. A curve that has no more points than that could give is returned as it is.

    Args:
        curve: any number of points.
        buckets: number of buckets, >= 1.
    """
    import numpy as np

    count = len(curve.step)
    if count <= 4 * buckets:
        return curve
    edges = np.arange(buckets + 1) * count // buckets
    bucket = np.repeat(np.arange(buckets), np.diff(edges))
    finite = np.isfinite(curve.value)
    rising = np.flatnonzero(finite)
    rising = rising[np.lexsort((curve.value[rising], bucket[rising]))]
    last_of_bucket = np.flatnonzero(np.diff(bucket[rising], append=buckets))
    strange = np.flatnonzero(~finite)
    kept = np.unique(
        np.concatenate(
            (
                edges[:-1],
                edges[1:] - 1,
                rising[_first_of_each(bucket[rising])],
                rising[last_of_bucket],
                strange[_first_of_each(bucket[strange])],
            )
        )
    )
    return Curve(curve.step[kept], curve.value[kept])


def smooth(curve: Curve) -> Curve:
    """Return medians over a fiftieth of the finite points, at 200 places; fewer points are returned as they are.

    A median follows a change of level at once, and no single outlier.

    Args:
        curve: any number of points.
    """
    import numpy as np

    finite = np.isfinite(curve.value)
    step, value = curve.step[finite], curve.value[finite]
    width = len(value) // _SMOOTH_SHARE
    if width < 2:
        return Curve(step, value)
    starts = np.unique(np.linspace(0, len(value) - width, _SMOOTH_POINTS).astype(np.int64))
    windows = np.lib.stride_tricks.sliding_window_view(value, width)[starts]
    middle = starts + width // 2
    middle[-1] = len(value) - 1  # the line ends where the run does
    middle[0] = 0
    return Curve(step[middle], np.median(windows, axis=1))


def _first_of_each(bucket: NDArray[np.int64]) -> NDArray[np.int64]:
    """The places at which a bucket begins, in their ascending order."""
    import numpy as np

    return np.flatnonzero(np.diff(bucket, prepend=-1))
