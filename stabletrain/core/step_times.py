"""How many steps are measured before a run, and what their times say. Standard library only."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

WARM_UP = 3
"""Steps that are not measured: the first ones allocate memory and choose kernels."""
FEWEST = 5
"""Steps that have a median and quartiles."""


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median, and the third quartile of the times of steps.

    The median leaves out a step that something else on the machine has delayed.

    Args:
        seconds: at least two.

    >>> quartiles([1.0, 2.0, 3.0, 4.0, 50.0])
    (2.0, 3.0, 4.0)
    """
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high
