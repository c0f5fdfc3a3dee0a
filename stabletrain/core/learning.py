"""Whether the loss of a run has fallen at all when a tenth of the run is over."""

from __future__ import annotations

from typing import NamedTuple

from stabletrain.core.slow_rise import MEAN_OF, SlowRise, deviation_about_line

_FIRST_OF = 5
"""Losses in the first value."""
_LEAST_RUN = 100
"""Applied steps; the first tenth of a shorter run says too little."""
_SHARE, _DEVIATIONS = 0.02, 3.0
"""A loss has fallen if it is lower by more than 2 % of the first value, or than 3 standard deviations."""


class NotLearning(NamedTuple):
    """The finding: the loss has not fallen.

    Args:
        steps: losses so far.
        first: mean of the first losses.
        lowest: lowest mean of `MEAN_OF` losses.
        limit: a loss that has fallen is below.
        noise: standard deviation of the last losses about a straight line.
    """

    steps: int
    first: float
    lowest: float
    limit: float
    noise: float


class Learning(NamedTuple):
    """State of the check; it is made once.

    Args:
        due: losses after which it is made; None: never, or it is done.
        first: mean of the first losses; None: not known yet.
    """

    due: int | None = None
    first: float | None = None

    def within(self, total_steps: int | None) -> Learning:
        """The state when the run's length is known: due after a tenth of it, and never in a very short run.

        Args:
            total_steps: applied steps of the whole run; None: unknown.
        """
        if total_steps is None or total_steps < _LEAST_RUN:
            return Learning()
        return self._replace(due=max(total_steps // 10, MEAN_OF))

    def add(self, losses: SlowRise) -> tuple[Learning, NotLearning | None]:
        """The state after a loss, and the finding if the check is made now and the loss has not fallen.

        A loss of both signs is not judged: near zero, as that of a policy gradient, it does not measure what is
        learned, and a share of it means nothing. A negative loss is compared with its noise only.

        Args:
            losses: the losses, this one included.
        """
        first = self.first
        if losses.steps == _FIRST_OF:
            first = sum(losses.recent) / _FIRST_OF
        if self.due is None or first is None or losses.steps < self.due:
            return Learning(self.due, first), None
        mean = sum(losses.recent[-MEAN_OF:]) / MEAN_OF
        lowest = mean if losses.lowest is None else min(mean, losses.lowest)
        noise = deviation_about_line(losses.recent)
        least = _DEVIATIONS * noise
        if not losses.negative:
            least = min(least, _SHARE * first)
        if (losses.positive and losses.negative) or not first - lowest <= least:
            return Learning(), None
        return Learning(), NotLearning(losses.steps, first, lowest, first - least, noise)
