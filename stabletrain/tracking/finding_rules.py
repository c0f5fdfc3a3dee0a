"""The rules that find something in a recorded run: functions of the series, and of the statistics of its loss curve.

Their thresholds are written in words in the table of `stabletrain.tracking.findings`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stabletrain.tracking import series as recorded
from stabletrain.tracking.series import Curve, Series


class Found(NamedTuple):
    """What a rule has found in a run.

    Args:
        text: the numbers, as a part of a sentence.
        advice: what to try, if it depends on the numbers; empty: the rule's.
        step: where it begins or is seen; None: in the whole run.
    """

    text: str
    advice: str = ""
    step: int | None = None


# ---- the loss curve --------------------------------------------------------------------------------------------------


def diverged(series: Series, curve: Curve | None) -> Found | None:
    """The loss ends far above its best, or is not finite at the end."""
    if series.ends_nonfinite:
        finite = np.flatnonzero(np.isfinite(series.loss) & series.applied)
        if not len(finite):
            return Found("no step has a finite loss", step=int(series.step[0]))
        since = int(series.step[finite[-1]]) + series.every
        return Found(f"the loss is not finite from step {since} on", step=since)
    if curve is None:
        return None
    if not np.isfinite(curve.s[-1]):
        return Found(f"no finite loss from step {int(curve.at[-1])} on", step=int(curve.at[-1]))
    if _ends_above_best(curve):
        return Found(
            f"the loss ends at {curve.end:.4g}, its best was {curve.best:.4g} at step {_best_step(curve)}",
            step=_best_step(curve),
        )
    return None


def _ends_above_best(curve: Curve) -> bool:
    rise = curve.end - curve.best
    enough = max(0.5 * curve.gain, curve.noise, 0.02 * abs(curve.first))
    return rise > enough and rise > 6 * curve.noise and curve.best_index < 0.9 * len(curve.s)


def ends_above_start(series: Series) -> bool:
    """Whether a run that is too short for a curve ends above its start."""
    if series.mixed or series.curve is not None or len(series.loss) < recorded.MIN_POINTS:
        return False
    first, end = recorded.median(series.loss[:3]), recorded.median(series.loss[-max(5, len(series.loss) // 10) :])
    return end > first + 0.5 * abs(first)


def exploded_at_start(series: Series) -> bool:
    """Whether all losses after the first are above twice the first: it exploded before a curve could show its fall."""
    if series.mixed or len(series.loss) < recorded.MIN_POINTS or int(series.step[0]) >= series.every:
        return False
    first, later = float(series.loss[0]), series.loss[1:][np.isfinite(series.loss[1:])]
    return bool(np.isfinite(first) and len(later) and later.min() > first + abs(first))


def did_not_learn(series: Series, curve: Curve | None) -> Found | None:
    """The loss has hardly fallen."""
    if curve is None or not _is_whole(series) or curve.has_fallen or diverged(series, curve):
        return None
    return Found(f"the loss was {curve.first:.4g} at first and {curve.best:.4g} at best")


def rises_at_the_start(series: Series, curve: Curve | None) -> Found | None:
    """The loss is above the first one for a while in the first fifth."""
    if curve is None or not _is_whole(series) or diverged(series, curve):
        return None
    early = curve.s[: max(3, len(curve.s) // 5)]
    high = early > curve.first + 0.2 * abs(curve.first) + 3 * max(curve.noise, curve.first_noise)
    if not (high[1:] & high[:-1]).any():
        return None
    top = int(np.nanargmax(early))
    return Found(f"from {curve.first:.4g} up to {early[top]:.4g} at step {int(curve.at[top])}", step=int(curve.at[top]))


def still_improving(series: Series, curve: Curve | None) -> Found | None:
    """The loss still falls at the end, at a rate that is still high."""
    if curve is None or curve.lr is None or not curve.has_fallen or diverged(series, curve):
        return None
    part = max(3, len(curve.s) // 10)
    fell = curve.mean(-2 * part, -part) - curve.mean(-part)
    if not (fell > max(4 * curve.noise * (2 / part) ** 0.5, 0.02 * curve.gain) and curve.lr[-1] > 0.5 * curve.peak_lr):
        return None
    share = curve.lr[-1] / curve.peak_lr
    return Found(f"the loss fell by {fell:.3g} in the last tenth, with the rate at {share:.0%} of its peak")


def plateau(series: Series, curve: Curve | None) -> Found | None:
    """The loss has stopped falling although the rate was not lowered."""
    if curve is None or curve.lr is None or not curve.has_fallen or diverged(series, curve):
        return None
    part = max(3, int(0.3 * len(curve.s)))
    fell = curve.mean(-2 * part, -part) - curve.mean(-part)
    is_flat = fell < max(2 * curve.noise * (2 / part) ** 0.5, 0.005 * curve.gain)
    is_at_zero = 0 <= curve.end <= 0.05 * curve.gain
    lowest = np.nanmin(curve.lr[-part:]) if np.isfinite(curve.lr[-part:]).any() else 0.0
    if not is_flat or is_at_zero or not lowest > 0.5 * curve.peak_lr:
        return None
    since = int(curve.at[-part])
    share = curve.lr[-1] / curve.peak_lr
    return Found(
        f"the loss is at {curve.end:.4g} since step {since}, with the rate at {share:.0%} of its peak", step=since
    )


def overfitting(series: Series, curve: Curve | None) -> Found | None:
    """The validation loss rises while the training loss falls."""
    steps, values = series.validation
    usable = np.isfinite(values) & (steps >= max(series.changes, default=0))
    steps, values = steps[usable], values[usable]
    if curve is None or len(values) < 5:
        return None
    at = int(values.argmin())
    best, rise = float(values[at]), float(values[-1] - values[at])
    lasts = len(values) - 1 - at >= 3 and bool((values[max(at + 1, len(values) - 3) :] > best).all())
    noise = recorded.sigma(np.diff(values)) / 2**0.5
    if not (lasts and rise > 0.05 * abs(best) and rise > 0.05 * float(values[0] - best) and rise > 3 * noise):
        return None
    then = int(np.searchsorted(curve.at, steps[at], side="right")) - 1
    if not curve.end < curve.mean(max(then, 0), max(then, 0) + 1):
        return None
    share = f"{rise / abs(best):.0%} above" if best else f"{rise:.3g} above"
    return Found(
        f"validation ends {share} its best, {best:.4g} at step {steps[at]}, while the training loss falls",
        f"stop at step {steps[at]}, or regularise: dropout, weight decay, more data",
        int(steps[at]),
    )


# ---- single steps ----------------------------------------------------------------------------------------------------


def spiky(series: Series, curve: Curve | None) -> Found | None:
    """Many single losses are far above those before them."""
    steps, tested = spikes(series)
    if len(steps) < 3 or len(steps) < 0.005 * tested:
        return None
    text = (
        f"{len(steps)} of {tested} losses ({len(steps) / tested:.1%}) are 6 sigma above the {recorded.BASELINE} before"
    )
    return Found(text, step=int(steps[0]))


def spikes(series: Series) -> tuple[NDArray[np.int64], int]:
    """The steps whose loss is an outlier, and how many could be one: neither dropped ones nor those undone later."""
    if series.mixed:
        return np.empty(0, np.int64), 0
    usable = series.applied & np.isfinite(series.loss)
    gain = series.curve.gain if series.curve is not None else 0.0
    undone = np.zeros(len(series.step), bool)
    for each in series.rollbacks:
        undone |= (series.step >= (each.step if each.to is None else each.to)) & (series.step < each.step)
    found, tested = [], 0
    borders = [0, *np.searchsorted(series.step, sorted(series.changes)), len(series.step)]
    for begin, end in itertools.pairwise(borders):
        at = begin + np.flatnonzero(usable[begin:end])
        hits = at[recorded.outliers(series.loss[at], gain, 6.0)]
        found.append(series.step[hits[~undone[hits]]])
        tested += max(0, len(at) - recorded.BASELINE)
    return np.concatenate(found), tested


def nonfinite_often(series: Series, curve: Curve | None) -> Found | None:
    """Many steps have a NaN or infinity that is not the loss scaler's."""
    bad = ~np.isfinite(series.loss)
    if series.grad_norm is not None:
        bad |= ~np.isfinite(series.grad_norm)
    bad &= series.has_loss
    count, expected = int(bad.sum()), max(int(series.has_loss.sum()), 1)
    if not count > 0.01 * expected:
        return None
    first = int(series.step[bad.argmax()])
    return Found(f"{count / expected:.1%} of the steps, the first at step {first}", step=first)


def skips_many(series: Series, curve: Curve | None) -> Found | None:
    """Rules have dropped many steps."""
    count = _count(series.skipped) - _count(series.without_loss)
    if count < 5 or count <= 0.01 * series.steps:
        return None
    return Found(f"{count} of {series.steps} steps were dropped ({count / series.steps:.1%})")


def skips_in_one_place(series: Series, curve: Curve | None) -> Found | None:
    """Most dropped steps are close together."""
    if series.skipped is None:
        return None
    counts = series.skipped - (series.without_loss if series.without_loss is not None else 0.0)
    at = np.flatnonzero(counts > 0)
    if not len(at) or counts[at].sum() < 5:
        return None
    places = np.repeat(at, np.round(counts[at]).astype(np.int64))
    low, high = np.percentile(places, [10, 90])
    if high - low >= 0.05 * len(series.step):
        return None
    inside = places[(places >= low) & (places <= high)]
    first, last = int(series.step[inside[0]]) - series.every + 1, int(series.step[inside[-1]])
    return Found(
        f"{len(inside)} of {len(places)} dropped steps are steps {first} to {last}",
        f"look at the data of steps {first} to {last} (events.jsonl names the samples where they are known)",
        first,
    )


def overflows(series: Series, curve: Curve | None) -> Found | None:
    """The loss scaler has dropped many steps."""
    count = _count(series.overflow)
    if count < 5 or count <= 0.05 * series.steps:
        return None
    return Found(f"{count} of {series.steps} steps overflowed in fp16 ({count / series.steps:.1%})")


def scale_collapsed(series: Series, curve: Curve | None) -> Found | None:
    """The loss scale is below 1 at the end."""
    if series.loss_scale is None or not 0 <= series.loss_scale < 1:
        return None
    return Found(f"the loss scale ends at {series.loss_scale:.3g}")


# ---- gradients -------------------------------------------------------------------------------------------------------


def gradients_grow(series: Series, curve: Curve | None) -> Found | None:
    """The gradient norm is far above what it was."""
    if series.grad_norm is None or series.mixed:
        return None
    begin = int(np.searchsorted(series.step, max(series.changes, default=0)))
    norms = series.grad_norm[begin:]
    count = len(norms)
    if count < recorded.MIN_POINTS:
        return None
    then = recorded.median(norms[int(0.1 * count) : int(0.3 * count)])
    now = recorded.median(norms[-max(1, 10 // series.every, count // 10) :])
    if not (then > 0 and now > 10 * then):
        return None
    return Found(f"the median norm went from {then:.3g} to {now:.3g}")


def vanishing(series: Series, curve: Curve | None) -> Found | None:
    """The gradient of the first layer is far below that of another one."""
    known = [layer for layer in series.layers if np.isfinite(layer.rms)]
    if len(known) < 2 or known[0] is not series.layers[0]:
        return None
    largest = max(known, key=lambda layer: layer.rms)
    if not known[0].rms < 1e-3 * largest.rms:
        return None
    return Found(f"the gradient of {known[0].name} is {known[0].rms / largest.rms:.1e} of that of {largest.name}")


def clipped_always(series: Series, curve: Curve | None) -> Found | None:
    """Most steps are clipped."""
    if series.clipped is None or series.clips_tensors or series.mixed:
        return None
    begin = 0
    if series.lr is not None and np.isfinite(series.peak_lr):
        begin = int(np.argmax(series.lr >= 0.99 * series.peak_lr))
    if (len(series.step) - begin) * series.every < recorded.MIN_STEPS:
        begin = 0
    share = float(series.clipped[begin:].mean()) / series.every
    if not share > 0.5:
        return None
    norm = _percentile_90(series, begin)
    bound = f", or bound it at {norm:.3g}, the 90th percentile of the norms" if norm is not None else ""
    return Found(f"{share:.0%} of the steps{' after warm-up' if begin else ''}", f"a lower learning rate{bound}")


def clipped_never(series: Series, curve: Curve | None) -> Found | None:
    """A fixed bound has not clipped a single step."""
    if series.bound is None or series.clipped is None or series.steps < 1000 or _count(series.clipped):
        return None
    norm = _percentile_90(series, 0)
    if norm is None or series.grad_norm is None:
        return None
    largest = float(np.nanmax(series.grad_norm[np.isfinite(series.grad_norm)]))
    return Found(
        f"the bound is {series.bound:.3g}, the largest norm {largest:.3g}",
        f"nothing, since it does no harm; a bound that acts is {norm:.3g}, the 90th percentile of the norms",
    )


def _percentile_90(series: Series, begin: int) -> float | None:
    norms = np.empty(0) if series.grad_norm is None else series.grad_norm[begin:]
    norms = norms[np.isfinite(norms)]
    return float(np.percentile(norms, 90)) if len(norms) else None


# ---- the run ---------------------------------------------------------------------------------------------------------


def rate_ends_early(series: Series, curve: Curve | None) -> Found | None:
    """A rate that decays gradually is at its end long before the run."""
    step, lr = (series.step, series.lr) if series.rates is None else series.rates
    if lr is None or not len(lr) or not np.isfinite(lr).all() or not lr[-1] <= 0.1 * series.peak_lr:
        return None
    count, last = len(lr), float(lr[-1])
    higher = np.flatnonzero(lr > last * 1.001 + 1e-12 * series.peak_lr)
    if not len(higher) or not count - 1 - higher[-1] > 0.1 * count:
        return None
    before = lr[max(0, higher[-1] - max(4, count // 10)) : higher[-1] + 1]
    if len(np.unique(before)) < 3:  # in steps: the last one is as long as it was chosen
        return None
    since = int(step[higher[-1] + 1])
    return Found(f"the rate is {last:.2g} since step {since} of {int(series.step[-1]) + 1}", step=since)


def rollbacks_in_one_place(series: Series, curve: Curve | None) -> Found | None:
    """Two rollbacks have left out the same batches."""
    seen: dict[str, recorded.Rollback] = {}
    for each in series.rollbacks:
        same = [seen[batch] for batch in each.excluded if batch in seen]
        if same:
            return Found(
                f"those at steps {same[0].step} and {each.step} left out {len(same)} batches that are the same",
                step=same[0].step,
            )
        seen.update(dict.fromkeys(each.excluded, each))
    return None


def _is_whole(series: Series) -> bool:
    """Whether the curve begins with the run."""
    return series.from_start and not series.changes


def _best_step(curve: Curve) -> int:
    return int(curve.at[curve.best_index])


def _count(counts: recorded.Floats | None) -> int:
    return 0 if counts is None else round(float(counts.sum()))
