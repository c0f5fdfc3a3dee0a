"""Seeded series of pairs (loss in nats, raw gradient norm) to test a rule on.

>>> from stabletrain.testing import replay, series
>>> from stabletrain_plugins.clip_norm.rule import ClipNormRule
>>> steps = list(replay(ClipNormRule(max_norm=5.0), series.spike(series.calm(50), at=30)))
>>> [step.outcome.step for step in steps if step.outcome.clipped]
[30]
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import TypeAlias

Series: TypeAlias = list[tuple[float, float]]


def calm(steps: int = 200, *, loss: float = 2.0, norm: float = 1.0, sigma: float = 0.1, seed: int = 0) -> Series:
    """Healthy training at a constant level, with a log-normal norm and a normal loss.

    Args:
        steps: length, in attempted steps.
        loss: level of the loss, in nats.
        norm: median of the gradient norm.
        sigma: standard deviation of the norm's logarithm; the loss varies by a tenth of it, relatively.
        seed: of the noise.

    >>> calm(3) == calm(3), calm(3) == calm(3, seed=1)
    (True, False)
    """
    draw = random.Random(seed)
    return [
        (loss * (1.0 + 0.1 * sigma * draw.gauss(0, 1)), norm * math.exp(sigma * draw.gauss(0, 1))) for _ in range(steps)
    ]


def log_normal(steps: int = 200, *, sigma: float = 1.0, seed: int = 0) -> Series:
    """Healthy training with a long-tailed, log-normal gradient norm.

    Args:
        steps: length, in attempted steps.
        sigma: standard deviation of the norm's logarithm.
        seed: of the noise.
    """
    draw = random.Random(seed)
    return [(2.0 + 0.02 * draw.gauss(0, 1), math.exp(sigma * draw.gauss(0, 1))) for _ in range(steps)]


def decay(steps: int = 200, *, to: float = 0.1, seed: int = 0) -> Series:
    """Early training: loss and norm fall exponentially to a fraction of their first level.

    Args:
        steps: length, in attempted steps.
        to: the last level, as a fraction of the first, in (0, 1).
        seed: of the noise.
    """
    rate = math.log(to) / max(1, steps - 1)
    return [
        (loss * math.exp(rate * t), norm * math.exp(rate * t)) for t, (loss, norm) in enumerate(calm(steps, seed=seed))
    ]


def drift(steps: int = 200, *, factor: float = 2.0, seed: int = 0) -> Series:
    """A gradient norm that grows slowly at a constant loss.

    Args:
        steps: length, in attempted steps.
        factor: the norm's growth over the whole series.
        seed: of the noise.
    """
    rate = math.log(factor) / max(1, steps - 1)
    return [(loss, norm * math.exp(rate * t)) for t, (loss, norm) in enumerate(calm(steps, seed=seed))]


def level_shift(series: Sequence[tuple[float, float]], *, at: int, factor: float = 3.0) -> Series:
    """The gradient norm's level changes permanently: a new regime, not a fault.

    Args:
        series: the series to change.
        at: first step of the new level.
        factor: the new level, relative to the old.
    """
    return [(loss, norm * factor if t >= at else norm) for t, (loss, norm) in enumerate(series)]


def spike(series: Sequence[tuple[float, float]], *, at: int, norm: float = 100.0, loss: float = 1.0) -> Series:
    """One bad step.

    Args:
        series: the series to change.
        at: the step, from 0.
        norm: factor on its gradient norm.
        loss: factor on its loss.
    """
    return burst(series, at=at, length=1, norm=norm, loss=loss)


def burst(
    series: Sequence[tuple[float, float]], *, at: int, length: int = 10, norm: float = 100.0, loss: float = 1.0
) -> Series:
    """Bad steps in a row.

    Args:
        series: the series to change.
        at: the first of them, from 0.
        length: how many steps, >= 1.
        norm: factor on their gradient norms.
        loss: factor on their losses.
    """
    bad = range(at, at + length)
    return [(x * loss, g * norm) if t in bad else (x, g) for t, (x, g) in enumerate(series)]


def nonfinite(
    series: Sequence[tuple[float, float]],
    *,
    at: Iterable[int],
    loss: float | None = math.nan,
    norm: float | None = math.nan,
) -> Series:
    """NaN or infinity at given steps.

    Args:
        series: the series to change.
        at: the steps, from 0.
        loss: the loss at these steps; None: unchanged.
        norm: the gradient norm at these steps; None: unchanged.
    """
    bad = set(at)
    return [
        (x if loss is None else loss, g if norm is None else norm) if t in bad else (x, g)
        for t, (x, g) in enumerate(series)
    ]


def rough(steps: int = 200, *, seed: int = 0) -> Series:
    """A series with a spike, a burst, NaN and infinity, a raised loss, a zero norm and a level shift.

    Args:
        steps: length, in attempted steps, at least 100.
        seed: of the noise.
    """
    series = spike(calm(steps, seed=seed), at=steps * 2 // 5, loss=3.0)
    series = burst(series, at=steps // 2, length=4)
    series = nonfinite(series, at=[3, steps * 3 // 5], norm=None)
    series = nonfinite(series, at=[steps * 7 // 10], loss=None, norm=math.inf)
    series[steps // 4] = (series[steps // 4][0], 0.0)
    return level_shift(series, at=steps * 4 // 5)


HEALTHY: dict[str, Series] = {
    "calm": calm(300),
    "drift": drift(300),
    "decay": decay(300),
}
"""Series without faults."""

FAULTY: dict[str, Series] = {
    "spike": spike(calm(300), at=200, loss=2.0),
    "burst": burst(calm(300), at=200, loss=2.0),
    "level shift": level_shift(calm(300), at=150),
    "log-normal": log_normal(300),
    "rough": rough(300),
}
"""Series with spikes, bursts, level shifts, long tails or non-finite values."""
