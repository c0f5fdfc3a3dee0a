"""When the loss has risen, and when a reading gives an alarm: two judges, and what is kept of a series for them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

RISE, MEAN_OF, LASTS = 0.3, 10, 15
"""The loss has risen when the mean of the last 10 is 0.3 nats above the lowest such mean, for 15 steps in a row."""
FACTOR, FROM_STEP = 1.5, 40
"""The fixed limit is 1.5 times the largest value of the calibration runs; readings count from step 40 on."""
LEAD = 5
"""An alarm leads if it comes at least 5 steps before the loss has risen."""
LOOKS = 10
"""Every so many steps there is a value in `Summary.looks`."""
_OLDEST, _NEWEST, _LEAST_PAST, _DEVIATIONS, _FLOOR = 60, 10, 30, 6.0, 0.05
_SLOPE_FLOOR = 0.005
_RECORD = 0.02
_NEVER_LOSS = 20.0
"""Stands for a loss that is not finite."""

Values = Sequence[float | None]
"""A reading at each step; None where there is none."""


class Summary(NamedTuple):
    """What is kept of a reading of a run. Values are rounded to three digits.

    An alarm needs two values in a row above the limit (one, if the reading is taken now and then only), so the smaller
    of two in a row is what a limit is compared with.

    Args:
        largest: finite value from step 40 on.
        before: the largest of the smaller of two in a row, from step 40 until the cause of the trouble begins.
        records: steps from then on at which the smaller of two in a row was larger than the last record by 2 % or more,
            and these values; an alarm for any limit is found from them, late by no more than it takes to rise by 2 %.
        own: first alarm by the reading's own history from the cause on; None: none.
        own_before: alarms by its own history before.
        looks: values at the steps 9, 19, 29 and so on.
    """

    largest: float | None
    before: float | None
    records: list[tuple[int, float]]
    own: int | None
    own_before: int
    looks: list[float | None]


def risen(losses: Sequence[float], norms: Sequence[float]) -> int | None:
    """The first of the steps in which the loss has risen; None: it never did.

    A run that ends because a number is not finite has risen at its last step, if it has not before.

    Args:
        losses: of all steps, in nats; the last may not be finite.
        norms: the gradient norms of the same steps; the last may not be finite.
    """
    finite = [loss if math.isfinite(loss) else _NEVER_LOSS for loss in losses]
    lowest, in_a_row = math.inf, 0
    for step, mean in enumerate(means(finite)):
        if step >= MEAN_OF - 1:
            lowest = min(lowest, mean)
        in_a_row = in_a_row + 1 if step >= 2 * MEAN_OF and mean > lowest + RISE else 0
        if in_a_row == LASTS:
            return step - LASTS + 1
    ends = bool(losses) and not (math.isfinite(losses[-1]) and math.isfinite(norms[-1]))
    return len(losses) - 1 if ends else None


def from_losses(losses: Sequence[float], norms: Sequence[float]) -> dict[str, list[float | None]]:
    """Readings that are computed from losses and gradient norms alone.

    Returns:
        ``loss_change``: standard deviation of the last 20 changes of the loss's logarithm. ``norm_slope``: slope of the
        gradient norm's logarithm over 30 steps, per step. ``loss_rise``: 10-step mean above its lowest so far, in nats.
    """
    log_losses = [math.log(max(x, 1e-9)) if math.isfinite(x) else 9.0 for x in losses]
    log_norms = [math.log(max(x, 1e-12)) if math.isfinite(x) else 30.0 for x in norms]
    changes, slopes, rises = list[float | None](), list[float | None](), list[float | None]()
    lowest = math.inf
    finite = [x if math.isfinite(x) else _NEVER_LOSS for x in losses]
    for step, mean in enumerate(means(finite)):
        past = [log_losses[i] - log_losses[i - 1] for i in range(step - 19, step + 1)] if step >= 20 else []
        changes.append(statistics.pstdev(past) + 1e-6 if past else None)
        slopes.append(_slope(log_norms[step - 29 : step + 1]) if step >= 30 else None)
        lowest = min(lowest, mean) if step >= MEAN_OF - 1 else lowest
        rises.append(max(mean - lowest, 1e-9) if step >= MEAN_OF - 1 else None)
    return {"loss_change": changes, "norm_slope": slopes, "loss_rise": rises}


def own_history(values: Values, linear: bool = False) -> list[int]:
    """Steps at which a reading is far above its own last values, two steps in a row.

    Far is 6 robust standard deviations (1.4826 MAD) of the values from 60 to 10 steps ago above their median, of the
    logarithms, with a floor of 0.05.

    Args:
        values: of all steps.
        linear: of the values themselves, with a floor of 0.005, since they may be negative.
    """
    scaled = [_scaled(value, linear) for value in values]
    alarms, before = [], False
    for step in range(_OLDEST, len(scaled)):
        value = scaled[step]
        past = [x for x in scaled[step - _OLDEST : step - _NEWEST] if x is not None and math.isfinite(x)]
        if value is None or len(past) < _LEAST_PAST:
            before = False
            continue
        median = statistics.median(past)
        deviation = 1.4826 * statistics.median([abs(x - median) for x in past])
        above = value > median + _DEVIATIONS * max(deviation, _SLOPE_FLOOR if linear else _FLOOR)
        if above and before:
            alarms.append(step)
        before = above
    return alarms


def own_history_of_few(values: Values) -> list[int]:
    """The same for a reading of every 50th step: at least three earlier values, one alarm is enough, floor 0.2."""
    known = [(step, _scaled(value, False)) for step, value in enumerate(values) if value is not None]
    alarms = []
    for place, (step, value) in enumerate(known):
        past = [x for _, x in known[:place][-6:] if x is not None and math.isfinite(x)]
        if value is not None and len(past) >= 3:
            median = statistics.median(past)
            deviation = 1.4826 * statistics.median([abs(x - median) for x in past]) + 0.2
            if value > median + _DEVIATIONS * deviation:
                alarms.append(step)
    return alarms


def summary(values: Values, start: int | None, few: bool = False, linear: bool = False) -> Summary | None:
    """What is kept of a reading; None if the run does not have it.

    Args:
        values: of all steps; what is not finite counts as infinite.
        start: step at which the cause of the trouble begins; None: a healthy run.
        few: the reading is taken every 50 steps only: one value above a limit is an alarm.
        linear: see `own_history`.
    """
    counted = [None if x is None else x if math.isfinite(x) else math.inf for x in values]
    if all(x is None for x in counted):
        return None
    begin = len(counted) if start is None else start
    before, records = list[float](), list[tuple[int, float]]()
    for step in range(FROM_STEP, len(counted)):
        value = counted[step]
        if not few:
            previous = counted[step - 1] if step > FROM_STEP else None
            value = None if value is None or previous is None else min(value, previous)
        if value is None:
            continue
        if step < begin:
            before.append(value)
        elif not records or value > records[-1][1] + _RECORD * abs(records[-1][1]):
            records.append((step, value))
    alarms = own_history_of_few(counted) if few else own_history(counted, linear)
    finite = [x for x in counted[FROM_STEP:] if x is not None and x < math.inf]
    return Summary(
        largest=rounded(max(finite)) if finite else None,
        before=rounded(max(before)) if before else None,
        records=[(step, rounded(value)) for step, value in records],
        own=next((step for step in alarms if step >= begin), None),
        own_before=sum(step < begin for step in alarms),
        looks=[None if x is None else rounded(x) for x in counted[LOOKS - 1 :: LOOKS]],
    )


def fixed(kept: Summary, limit: float) -> int | None:
    """First alarm by a fixed limit since the cause began; None: none."""
    return next((step for step, value in kept.records if value > limit), None)


def fixed_before(kept: Summary, limit: float) -> bool:
    """Whether there was an alarm by a fixed limit before the cause began, in a healthy run at any time."""
    return kept.before is not None and kept.before > limit


def fixed_at_looks(kept: Summary, limit: float, every: int, start: int) -> int | None:
    """First alarm since the cause began, if the reading is taken every so many steps and one value is enough.

    Args:
        kept: of a reading of every step.
        limit: that a value must be above.
        every: steps, a multiple of LOOKS.
        start: step at which the cause begins.
    """
    for step, value in zip(range(LOOKS - 1, len(kept.looks) * LOOKS, LOOKS), kept.looks, strict=True):
        if (step + 1) % every == 0 and step >= max(start, FROM_STEP) and value is not None and value > limit:
            return step
    return None


def rounded(value: float) -> float:
    """The value to three digits."""
    return float(f"{value:.3g}")


def means(values: Sequence[float]) -> list[float]:
    """Mean of the last 10 values, of fewer at the start."""
    return [sum(values[max(0, step - MEAN_OF + 1) : step + 1]) / min(MEAN_OF, step + 1) for step in range(len(values))]


def _slope(values: Sequence[float]) -> float:
    middle, mean = (len(values) - 1) / 2, sum(values) / len(values)
    squares = sum((i - middle) ** 2 for i in range(len(values)))
    return sum((i - middle) * (value - mean) for i, value in enumerate(values)) / squares


def _scaled(value: float | None, linear: bool) -> float | None:
    if value is None or value == math.inf:
        return value
    return value if linear else math.log(max(value, 1e-12))
