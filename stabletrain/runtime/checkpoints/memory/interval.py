"""The number of steps between two copies in memory: given, or chosen so that copies cost little of the steps' time."""

from __future__ import annotations

import math
from collections import deque
from statistics import mean, median

from stabletrain.runtime.checkpoints.memory.options import Every

SHARE = 0.02
"""Of the steps' time that copies may cost."""
_FIRST = 10
"""Steps before the first copy, by which the duration of a step is known."""
_SECOND = 50
"""Least number of steps to the second copy: what the first one costs while it is written is not known before."""
_RECENT = 50
"""Steps, of which the median is the duration of a step."""
_LONGEST = 5.0
"""Of the duration of a step, what counts at most of one while a copy is written."""
_MOST = 10**6


class Interval:
    """When the next copy is due. The steps are the same on all ranks, if all get the same ``steps`` in `saved`.

    The cost of a copy is the time that training waits for it, and the time by which the steps that run while it is
    written take longer than others.

    Args:
        every: applied steps, or ``"auto"``.
        step: applied steps so far.
    """

    def __init__(self, every: Every, step: int) -> None:
        self._every = every
        self._next = step + _FIRST
        self._at = step
        self._copies = 0
        self._quiet: deque[float] = deque(maxlen=_RECENT)
        self._busy: list[float] = []
        self._costs: deque[float] = deque(maxlen=4)

    @property
    def is_automatic(self) -> bool:
        """Whether ranks must agree on the next copy."""
        return self._every == "auto"

    def due(self, step: int) -> bool:
        """Whether a copy is due after a step; once for each step.

        Args:
            step: applied steps so far.
        """
        moved, self._at = step != self._at, step
        if isinstance(self._every, int):
            return moved and step % self._every == 0
        return moved and step >= self._next

    def took(self, seconds: float, writing: bool) -> None:
        """A step was made.

        Args:
            seconds: its duration, without the wait for a copy.
            writing: whether a copy was being written meanwhile.
        """
        if writing and self._quiet:
            self._busy.append(min(seconds, _LONGEST * median(self._quiet)))  # longer: a validation, say
        else:
            self._quiet.append(seconds)

    def wish(self, waited: float) -> int:
        """The steps to the next copy by this rank's measurements, after a copy was taken.

        Args:
            waited: seconds that training waited for it.
        """
        step = max(median(self._quiet), 1e-6) if self._quiet else 1.0
        if self._costs:  # of the copy before this one, which has been written since
            self._costs[-1] += max(0.0, sum(self._busy) - step * len(self._busy))
        self._costs.append(waited)
        lasts, self._busy = len(self._busy), []
        known = list(self._costs)[:-1] or [waited]  # what this copy costs while it is written shows only later
        steps = max(math.ceil(mean(known) / (SHARE * step)), lasts + 1)
        return min(steps if self._copies else max(steps, _SECOND), _MOST)

    def saved(self, step: int, steps: int) -> None:
        """A copy was taken.

        Args:
            step: applied steps so far.
            steps: from here to the next copy, as agreed by all ranks.
        """
        self._copies += 1
        self._next = step + max(steps, 1)
