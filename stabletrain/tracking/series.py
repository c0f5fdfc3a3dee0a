"""What a run has recorded, as arrays, and the statistics of its loss that the findings are made from.

A point is one attempted step, or the mean of several where only sampled metrics were recorded. No point is looked at
by a Python loop: a run of a million steps takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stabletrain.core.statistics import MAD_TO_SIGMA

Floats: TypeAlias = NDArray[np.float64]

MIN_STEPS = 100
"""Steps below which nothing is concluded from a run."""
MIN_POINTS = 20
"""Points below which nothing is concluded from a curve, however many steps each stands for."""
BASELINE = 128
"""Finite losses that a single one is compared with."""
_STEADY = 20
"""Points of a median from which on it says more about the start than the first ten losses."""
_COMPARED = 20_000
"""Positions at which the baseline is computed, at most; between them it is the last one."""


class Rollback(NamedTuple):
    """A return to an earlier state.

    Args:
        step: attempted steps when it was made.
        to: attempted steps of the state; None if it was a checkpoint.
        excluded: identities of the batches that were left out.
    """

    step: int
    to: int | None = None
    excluded: frozenset[str] = frozenset()


class Layer(NamedTuple):
    """A layer of a model.

    Args:
        name: of its module.
        rms: root mean square of its gradient, the median over the run; or the L2 norm, if all layers are of one size.
    """

    name: str
    rms: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """A recorded run.

    Args:
        step: number of the attempted step of each point, ascending.
        loss: in the module's unit; NaN where none was recorded.
        grad_norm: L2, before clipping; NaN where none was recorded. None: never.
        clipped: how many of a point's steps were clipped. None: unknown.
        skipped: the same of dropped steps.
        overflow: the same of steps that the fp16 loss scaler dropped.
        without_loss: the same of steps for which ``training_step`` gave no loss.
        every: steps for each point, >= 1.
        lr: learning rate at each point. None: unknown.
        rates: steps at which a rate was recorded, and the rates, of which ``lr`` is interpolated. None: at each point.
        loss_scale: last scale of the fp16 loss scaler. None: there is none.
        validation: steps and validation losses, ascending.
        layers: from the input to the output.
        rollbacks: in order.
        bound: the fixed bound of the global gradient norm. None: there is none.
        clips_tensors: whether single tensors or elements are clipped, which happens at nearly every step by design.
        changes: steps at which the training changed by design.
        spikes: steps at which a detector has reported a loss above its limit.
        mixed: whether the points are steps of several optimizers, whose losses have nothing to do with each other.
    """

    step: NDArray[np.int64]
    loss: Floats
    grad_norm: Floats | None = None
    clipped: Floats | None = None
    skipped: Floats | None = None
    overflow: Floats | None = None
    without_loss: Floats | None = None
    every: int = 1
    lr: Floats | None = None
    rates: tuple[NDArray[np.int64], Floats] | None = None
    loss_scale: float | None = None
    validation: tuple[NDArray[np.int64], Floats] = field(default_factory=lambda: (np.empty(0, np.int64), np.empty(0)))
    layers: Sequence[Layer] = ()
    rollbacks: Sequence[Rollback] = ()
    bound: float | None = None
    clips_tensors: bool = False
    changes: Sequence[int] = ()
    spikes: Sequence[int] = ()
    mixed: bool = False

    @property
    def steps(self) -> int:
        """Attempted steps that the points stand for."""
        return len(self.step) * self.every

    @property
    def is_long_enough(self) -> bool:
        """Whether anything is concluded from it."""
        return self.steps >= MIN_STEPS and len(self.step) >= MIN_POINTS

    @property
    def from_start(self) -> bool:
        """Whether the first steps of the run are among the points."""
        return bool(len(self.step)) and int(self.step[0]) <= max(2 * self.every, MIN_STEPS // 2)

    @cached_property
    def has_loss(self) -> NDArray[np.bool_]:
        """Which points should have a finite loss: all but those without one by design, and overflows."""
        expected = np.ones(len(self.step), bool)
        for counts in (self.without_loss, self.overflow):
            if counts is not None:
                expected &= counts < self.every
        return expected

    @cached_property
    def applied(self) -> NDArray[np.bool_]:
        """Which points have a step that changed the weights."""
        return self.has_loss if self.skipped is None else self.has_loss & (self.skipped < self.every)

    @cached_property
    def peak_lr(self) -> float:
        """The largest learning rate; NaN if unknown."""
        return _finite_max(self.lr) if self.lr is not None else float("nan")

    @cached_property
    def ends_nonfinite(self) -> bool:
        """Whether the last applied steps had no finite loss: weights that are NaN stay so."""
        applied = self.loss[self.applied]
        return bool(len(applied)) and not np.isfinite(applied[-1])

    @cached_property
    def curve(self) -> Curve | None:
        """The statistics of the loss since the last change by design; None if there are too few points."""
        if self.mixed:
            return None
        begin = int(np.searchsorted(self.step, max(self.changes, default=0)))
        at = begin + np.flatnonzero(self.has_loss[begin:])
        if len(at) < MIN_POINTS or len(at) * self.every < MIN_STEPS or not np.isfinite(self.loss[at]).any():
            return None
        return Curve(self.step[at], self.loss[at], None if self.lr is None else self.lr[at], self.every)


class Curve:
    """Statistics of a loss curve: medians of about 1/50 of the steps, their noise, first, best and last level.

    Args:
        step: of each point.
        loss: at least one is finite.
        lr: learning rate at each point; None: unknown.
        every: steps for each point.
    """

    def __init__(self, step: NDArray[np.int64], loss: Floats, lr: Floats | None, every: int) -> None:
        self.width = max(-(-5 // every), len(step) // 50)
        """Points of one median."""
        self.s = _medians(loss, self.width)
        """The medians; the last window ends with the last point, the first one may be shorter."""
        offset = len(self.s) * self.width - len(step)
        self.at = step[np.maximum(np.arange(len(self.s)) * self.width - offset, 0)]
        """The first step of each window."""
        self.last_step = int(step[-1])
        finite = self.s[np.isfinite(self.s)]
        self.first = median(loss[: max(-(-5 // every), 3)])
        """Loss of the first five steps, before a rate that is too high shows; NaN if none was finite."""
        self._first_ten = median(loss[: max(-(-10 // every), 3)])
        self.best_index = int(np.nanargmin(np.where(np.isfinite(self.s), self.s, np.nan))) if len(finite) else 0
        self.best = float(self.s[self.best_index]) if len(finite) else float("nan")
        self.end = median(self.s[-max(2, len(self.s) // 20) :])
        """Loss of the last twentieth."""
        differences = np.diff(finite)
        self.noise = sigma(differences) / 2**0.5 + 1e-12 * max(1.0, abs(self.best)) if len(differences) else 0.0
        """Robust standard deviation of one median."""
        self.gain = self.first - self.best
        self.first_noise = self.noise * max(1.0, self.width * every / 5) ** 0.5
        """Robust standard deviation of the first loss, if the noise does not change with the loss."""
        self.lr = None if lr is None else _medians(lr, self.width)
        self.peak_lr = float("nan") if lr is None else _finite_max(lr)

    @property
    def has_fallen(self) -> bool:
        """Whether the loss has fallen by more than its noise, and by a part of itself that matters."""
        start = min(self.first, self._first_ten)  # five alone may be high by chance
        steady = self.s[0] <= self.first + 3 * self.first_noise
        if self.width >= _STEADY and steady:  # the first median is of many steps, and the loss had not risen by then
            start = max(start, float(self.s[0]))
        return start - self.best >= max(0.02 * abs(self.first), 3 * self.noise)

    def mean(self, begin: int, end: int | None = None) -> float:
        """The mean of the finite medians in a range of windows; NaN if there is none."""
        part = self.s[begin:end]
        part = part[np.isfinite(part)]
        return float(part.mean()) if len(part) else float("nan")


def median(values: Floats) -> float:
    """The median of the finite values; NaN if there is none.

    Args:
        values: any number of them.
    """
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else float("nan")


def sigma(values: Floats) -> float:
    """The robust standard deviation of finite values: from the median absolute deviation.

    Args:
        values: at least one.
    """
    return MAD_TO_SIGMA * float(np.median(np.abs(values - np.median(values))))


def outliers(loss: Floats, gain: float, sigmas: float) -> NDArray[np.bool_]:
    """Mark the losses that lie far above the median of the 128 before them.

    The limit is the higher one of a linear and a log-normal one, as that of the rules that act during a run (decision
    0007): median + sigmas robust standard deviations, and the same distance for a loss with the upper quartile of a
    log-normal one. A standard deviation is at least 2 % of the median, and 1 % of what the whole run has gained.

    Args:
        loss: finite.
        gain: by which the loss has fallen in the whole run.
        sigmas: the distance, > 0.
    """
    found = np.zeros(len(loss), bool)
    if len(loss) <= BASELINE:
        return found
    stride = 1 + len(loss) // _COMPARED
    windows = np.lib.stride_tricks.sliding_window_view(loss[:-1], BASELINE)[::stride]
    half, quarter = BASELINE // 2, 3 * BASELINE // 4
    ordered = np.partition(windows, (half - 1, half, quarter), axis=1)
    centre = (ordered[:, half - 1] + ordered[:, half]) / 2
    spread = MAD_TO_SIGMA * np.median(np.abs(windows - centre[:, None]), axis=1)
    limit = centre + sigmas * np.maximum(np.maximum(spread, 0.02 * np.abs(centre)), 0.01 * max(gain, 0.0))
    positive = centre > 0
    ratio = ordered[positive, quarter] / centre[positive]
    limit[positive] = np.maximum(limit[positive], centre[positive] * ratio ** (MAD_TO_SIGMA * sigmas))
    found[BASELINE:] = loss[BASELINE:] > np.repeat(limit, stride)[: len(loss) - BASELINE]
    return found


def _medians(values: Floats, width: int) -> Floats:
    """The medians of the finite values in windows of a width, which end with the last value; NaN where none is."""
    count = -(-len(values) // width)
    padded = np.full(count * width, np.nan)
    padded[len(padded) - len(values) :] = np.where(np.isfinite(values), values, np.nan)
    rows = padded.reshape(count, width)
    result = np.full(count, np.nan)
    some = np.isfinite(rows).any(axis=1)
    result[some] = np.nanmedian(rows[some], axis=1)
    return result


def _finite_max(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else float("nan")
