"""A slow rise of the loss: too slow for the limits of `stabletrain.core.spikes`, which follow it.

The mean of the last losses is compared with the lowest such mean so far. In benchmarks/early_warning.py the rule
reports 34 of 39 rises in small trainings within 8 steps, and none in 56 healthy ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

MEAN_OF, FIT_OF, IN_A_ROW = 20, 60, 5
"""Losses in a mean; losses whose noise is measured; steps in a row that make a rise."""
_ERRORS, _SHARE, _RANGE_SHARE = 6.0, 0.05, 0.002
"""A rise is more than 6 standard errors, 5 % of the lowest mean, and 0.2 % of what the loss has fallen."""
_BLOCKS = 8
"""Blocks of losses from which the usual noise is known."""
_LARGEST = 1e300
_MAX_CORRELATION = 0.95
_COMMON_CORRELATION = 0.2
"""Independent values of which 60 are measured seem this correlated by chance."""


class Rise(NamedTuple):
    """The finding: the loss has risen slowly.

    Args:
        mean: of the last losses.
        limit: that the mean is above.
        lowest: the lowest mean before.
        step: attempted step at which it was reached.
    """

    mean: float
    limit: float
    lowest: float
    step: int


class SlowRise(NamedTuple):
    """What is remembered of the losses of a run.

    A rise is reported once. It is over when the mean has come back by half of the margin, when a new lowest mean is
    reached, or with `restart`; a rise after that is reported again.

    Args:
        steps: losses so far, those before a `restart` included.
        recent: the last of them.
        lowest: the lowest mean of `MEAN_OF` losses since the start or a `restart`; None: not measured yet.
        lowest_step: attempted step at which it was reached.
        reference: the losses up to that step.
        noise: of the loss, see `_noise`; None: not computed yet. It is needed only when the mean is above the lowest.
        noises: noise of the last blocks of `FIT_OF` losses outside of a rise, oldest first.
        fall: from the highest mean before to the lowest.
        highest: the highest mean.
        positive: a loss above 0 has been seen, before a `restart` included.
        negative: the same for a loss of 0 or below.
        in_a_row: consecutive means above the limit.
        reported: the present rise is reported.
    """

    steps: int = 0
    recent: tuple[float, ...] = ()
    lowest: float | None = None
    lowest_step: int = 0
    reference: tuple[float, ...] = ()
    noise: float | None = None
    noises: tuple[float, ...] = ()
    fall: float = 0.0
    highest: float = -math.inf
    positive: bool = False
    negative: bool = False
    in_a_row: int = 0
    reported: bool = False

    def add(self, loss: float, step: int) -> tuple[SlowRise, Rise | None]:
        """The state with one more loss, and a rise if it is to be reported now.

        Args:
            loss: finite; ignored if sums of such numbers may overflow.
            step: number of the attempted step.
        """
        if abs(loss) > _LARGEST:
            return self, None
        steps, recent, lowest, at, reference, noise, noises, fall, highest, above, below, in_a_row, reported = self
        steps, recent = steps + 1, (*recent[-FIT_OF + 1 :], loss)
        above, below = above or loss > 0.0, below or loss <= 0.0
        if len(recent) >= MEAN_OF:
            mean = sum(recent[-MEAN_OF:]) / MEAN_OF
            highest = mean if mean > highest else highest
        if len(recent) < FIT_OF:
            return SlowRise(steps, recent, noises=noises, highest=highest, positive=above, negative=below), None
        if not steps % FIT_OF and not in_a_row:
            noises, noise = (*noises[-_BLOCKS + 1 :], noise_of(recent)), None
        rise = None
        if lowest is None or mean < lowest:
            lowest, at, reference, noise, fall, in_a_row, reported = mean, step, recent, None, highest - mean, 0, False
        elif not in_a_row and mean - lowest <= _SHARE * lowest and not reported:
            pass  # the usual case, without the noise
        else:
            if noise is None:
                noise = _noise(reference, noises)
            margin = _margin(steps, lowest, noise, fall, signed=above and below)
            in_a_row = in_a_row + 1 if mean - lowest > margin else 0
            if in_a_row >= IN_A_ROW and not reported:
                reported, rise = True, Rise(mean, lowest + margin, lowest, at)
            elif reported and mean - lowest <= 0.5 * margin:
                reported = False
            in_a_row = min(in_a_row, IN_A_ROW)
        state = SlowRise(
            steps, recent, lowest, at, reference, noise, noises, fall, highest, above, below, in_a_row, reported
        )
        return state, rise

    def restart(self, losses: Iterable[float] = ()) -> SlowRise:
        """The state after a change of the level that is known, or meant: rises are measured from the new level on.

        Args:
            losses: finite losses at the new level, oldest first; with `FIT_OF` of them the next mean is the lowest,
                with fewer it is measured when there are as many.
        """
        recent = tuple(losses)[-FIT_OF:]
        return SlowRise(self.steps, recent, noises=self.noises, positive=self.positive, negative=self.negative)

    def rebase(self) -> SlowRise:
        """The state after a rollback to the snapshot that it is from."""
        return self._replace(in_a_row=0)


def _margin(steps: int, lowest: float, noise: float, fall: float, signed: bool) -> float:
    """What the mean may be above the lowest one; infinite if the loss cannot be judged.

    The lowest of many means lies below the level by chance, the highest above it, each by ``sqrt(2 ln steps)`` standard
    errors; beyond 8,000 steps that is more than 6 standard errors of a difference.

    A share of a loss that may be zero or negative means nothing; then what it has fallen is the scale. A loss of both
    signs that has not fallen by more than its noise, such as that of a policy gradient or one of rounding errors, does
    not measure how well the model is trained.
    """
    errors = max(_ERRORS, 2.0 * math.sqrt(math.log(max(steps, 1)))) * noise * math.sqrt(2.0 / MEAN_OF)
    if lowest > 0.0 and not signed:
        return max(errors, _SHARE * lowest, _RANGE_SHARE * fall)
    margin = max(errors, _SHARE * fall, _SHARE * lowest)
    return margin if math.isfinite(margin) and not (signed and fall <= errors) else math.inf


def _noise(reference: Sequence[float], noises: Sequence[float]) -> float:
    """The noise at the lowest mean or, if that is more, the usual one: 60 losses may look calm by chance.

    The usual one is a quartile: in the first blocks the loss often falls along a curve, which looks like noise.
    """
    usual = sorted(noises)[(len(noises) - 1) * 3 // 4] if noises else 0.0
    return max(noise_of(reference), usual)


def noise_of(losses: Sequence[float]) -> float:
    """Standard deviation about a straight line, of independent values that would make means as noisy as these do.

    It is the standard deviation itself, unless consecutive values are correlated. For a correlation ``r`` of neighbours
    (first-order autoregression) it is that of the innovations over ``1 - r``. The estimate of ``r`` from n values about
    a line is too low by about ``(2 + 4 r) / n``, which is corrected.

    Args:
        losses: at least 4, up to 1e300; the result is infinite where their squares overflow.
    """
    n = len(losses)
    rest, squares = _about_line(losses)
    deviation = math.sqrt(squares / (n - 2))
    if not 0.0 < squares < math.inf:
        return deviation
    measured = sum(x * y for x, y in pairwise(rest)) / squares
    if measured < _COMMON_CORRELATION:
        return deviation
    r = min((measured + 2.0 / n) / (1.0 - 4.0 / n), _MAX_CORRELATION)
    return deviation * math.sqrt(max(1.0 - 2.0 * r * measured + r * r, 0.0)) / (1.0 - r)


def deviation_about_line(losses: Sequence[float]) -> float:
    """Standard deviation about a straight line.

    Args:
        losses: at least 3, up to 1e300; the result is infinite where their squares overflow.
    """
    return math.sqrt(_about_line(losses)[1] / (len(losses) - 2))


def _about_line(losses: Sequence[float]) -> tuple[list[float], float]:
    """The residuals of a least-squares line, and the sum of their squares."""
    n = len(losses)
    middle, mean = (n - 1) / 2, sum(losses) / n
    slope = sum((i - middle) * (loss - mean) for i, loss in enumerate(losses)) * 12.0 / (n * (n * n - 1.0))
    rest = [loss - mean - slope * (i - middle) for i, loss in enumerate(losses)]
    return rest, sum(x * x for x in rest)
