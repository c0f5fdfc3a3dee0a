"""Learning-rate curves: pure functions of the number of applied optimizer steps. Standard library only, float64.

`factor(step)` of a curve is the factor on the base learning rate for the update with index `step`. The index counts
applied steps from 0, so it is the number of updates before this one. Factors lie in [0, 1].

A schedule is `Warmup(steps, body)`: a linear rise to the first value of the body, which counts its steps from the end
of the warm-up. A `Tail` decreases any body over its last steps. Bodies with an end stay at their final value after it;
constant, exponential, multi-step and power bodies have no end.

**The convention.** With a warm-up of W steps the first factor is 1/W, not 0, and that of index W-1 is 1: a step with a
rate of zero would waste a batch. The descent begins at index W, with 1, and reaches its final value at index `total`,
the first index after a run of `total` steps, so that the last step does not have a rate of zero either.

| implementation                     | index t < W | first factor | descent              | the same here           |
|------------------------------------|-------------|--------------|----------------------|-------------------------|
| this module                        | (t + 1) / W | 1/W          | index W to `total`   |                         |
| torchtitan                         | (t + 1) / W | 1/W          | index W to `total`   | default                 |
| transformers, OLMo-core, Composer, | t / W       | 0            | index W to `total`   | `from_zero=True`        |
| Megatron-LM                        |             |              |                      |                         |
| torch OneCycleLR                   | cosine rise | 1/div_factor | to index `total` - 1 | `OneCycle(total - 1, )` |
"""

import bisect
import itertools
import math
from dataclasses import dataclass
from typing import Literal, Protocol

from stabletrain.errors import require

TailShape = Literal["linear", "cosine", "1-sqrt"]


class Curve(Protocol):
    """A factor on the base learning rate for every step."""

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`, >= 0; in [0, 1]."""
        ...


def descent(progress: float, shape: TailShape) -> float:
    """Completed share of a descent, 0 to 1, after the share `progress` (clamped to 0 to 1) of its time.

    Args:
        progress: share of the descent's time that has passed.
        shape: `"linear"`; `"cosine"` (half a period, https://arxiv.org/abs/1608.03983); or `"1-sqrt"`, steep at first
            (the rest is 1 - sqrt(progress), https://arxiv.org/abs/2405.18392).

    >>> [descent(0.25, shape) for shape in ("linear", "1-sqrt")]
    [0.25, 0.5]
    """
    progress = min(max(progress, 0.0), 1.0)
    if shape == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    return math.sqrt(progress) if shape == "1-sqrt" else progress


@dataclass(frozen=True)
class Warmup:
    """A linear rise over `steps` steps to the first value of `body`, which counts its steps from the end of the rise.

    During warm-up the second-moment estimates and the curvature settle before full steps are taken
    (https://arxiv.org/abs/1706.02677, https://arxiv.org/abs/2406.09405).

    Args:
        steps: length in applied steps; >= 0, 0 is none.
        body: the curve after the rise.
        from_zero: begin at 0 and reach the body one step later, as transformers, OLMo-core and Composer do.

    >>> curve = Warmup(4, Constant())
    >>> [curve.factor(step) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    steps: int
    body: Curve
    from_zero: bool = False

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "lr_warmup", "at least 0 steps", self.steps)

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        if step >= self.steps:
            return self.body.factor(step - self.steps)
        return self.body.factor(0) * (step + (not self.from_zero)) / self.steps


@dataclass(frozen=True)
class Constant:
    """Always 1.

    >>> Constant().factor(10)
    1.0
    """

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        return 1.0


@dataclass(frozen=True)
class Tail:
    """`body`, decreased to `min_factor` over the last `decay` of `steps` steps, from its value at the tail's start.

    Over a `Constant` this is WSD: warm-up, stable, decay (https://arxiv.org/abs/2404.06395). With `decay == steps` it
    is the linear (https://arxiv.org/abs/2310.07831) or cosine (https://arxiv.org/abs/1608.03983) descent.

    Args:
        body: the curve before the tail.
        steps: length of body and tail together, in steps; >= 1.
        decay: length of the tail in steps; 0 (none) to `steps`.
        shape: see `descent`.
        min_factor: the factor at the end and after it; 0 to 1. If the body is already lower, it stays constant.

    >>> wsd = Tail(Constant(), steps=10, decay=4, shape="linear")
    >>> [wsd.factor(step) for step in (5, 6, 7, 8, 9, 10, 99)]
    [1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    body: Curve
    steps: float
    decay: float
    shape: TailShape = "1-sqrt"
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        _require_horizon(self.steps)
        _require(
            0 <= self.decay <= self.steps, "decay", f"at most the {self.steps} steps after the warm-up", self.decay
        )
        _require_share(self.min_factor, "min_factor")

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        start = self.steps - self.decay
        if not self.decay or step <= start:
            return self.body.factor(step)
        top = self.body.factor(start)
        return top + (min(self.min_factor, top) - top) * descent((step - start) / self.decay, self.shape)


@dataclass(frozen=True)
class CosineRestarts:
    """Cosine descents from 1 to `min_factor`, one after another (SGDR, https://arxiv.org/abs/1608.03983).

    Args:
        steps: length of all descents together, in steps; >= 1.
        cycles: how many descents; >= 1.
        growth: length of a descent relative to the one before it; > 0. torch's `CosineAnnealingWarmRestarts` has
            `growth=T_mult` and `steps = T_0 + T_0 T_mult + ...` over the cycles.
        min_factor: the factor at the end of each descent, and after the last; 0 to 1.

    >>> [round(CosineRestarts(8, cycles=2).factor(step), 3) for step in (0, 2, 4, 6, 8)]
    [1.0, 0.5, 1.0, 0.5, 0.0]
    """

    steps: float
    cycles: int
    growth: float = 1.0
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        _require_horizon(self.steps)
        _require(self.cycles >= 1 and self.cycles == int(self.cycles), "cycles", "a whole number >= 1", self.cycles)
        _require(0 < self.growth < math.inf, "cycle_growth", "above 0", self.growth)
        _require_share(self.min_factor, "min_factor")

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        if step >= self.steps:
            return self.min_factor
        weights = [self.growth**cycle for cycle in range(self.cycles)]
        unit = self.steps / math.fsum(weights)
        starts = [unit * math.fsum(weights[:cycle]) for cycle in range(self.cycles)]
        cycle = bisect.bisect_right(starts, step) - 1
        progress = (step - starts[cycle]) / (unit * weights[cycle])
        return 1.0 + (self.min_factor - 1.0) * descent(progress, "cosine")


@dataclass(frozen=True)
class Power:
    """((step + timescale) / timescale) ** exponent: a power law of the steps since the start, without an end.

    `exponent=-0.5` is the inverse square root (https://arxiv.org/abs/1706.03762); -0.51 is the Power scheduler, meant
    to need no retuning for another batch size or length (https://arxiv.org/abs/2408.13359).

    Args:
        timescale: steps over which the curve stays near 1; > 0. The warm-up's length makes it a power of the index.
        exponent: <= 0.
        min_factor: the curve goes no lower; 0 to 1.

    >>> Power(100).factor(300)
    0.5
    """

    timescale: float
    exponent: float = -0.5
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.timescale < math.inf, "timescale", "above 0 steps", self.timescale)
        _require(-math.inf < self.exponent <= 0, "exponent", "at most 0", self.exponent)
        _require_share(self.min_factor, "min_factor")

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        return max(self.min_factor, math.pow((step + self.timescale) / self.timescale, self.exponent))


@dataclass(frozen=True)
class Exponential:
    """gamma ** (step / every), without an end.

    Args:
        gamma: factor per `every` steps; above 0, at most 1.
        every: in steps; > 0.
        min_factor: the curve goes no lower; 0 to 1.

    >>> Exponential(0.25, every=100).factor(50)
    0.5
    """

    gamma: float
    every: float = 1
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        _require(0 < self.gamma <= 1, "gamma", "above 0 and at most 1", self.gamma)
        _require(0 < self.every < math.inf, "gamma_every", "above 0 steps", self.every)
        _require_share(self.min_factor, "min_factor")

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        return max(self.min_factor, math.pow(self.gamma, step / self.every))


@dataclass(frozen=True)
class MultiStep:
    """1, multiplied by `gamma` at each milestone (as in https://arxiv.org/abs/1512.03385, section 4).

    Args:
        milestones: indices of the first update with the next lower factor; ascending, >= 0.
        gamma: above 0, at most 1.
        min_factor: the curve goes no lower; 0 to 1.

    >>> [MultiStep((2, 4), gamma=0.5).factor(step) for step in range(6)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    milestones: tuple[float, ...]
    gamma: float
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        milestones = self.milestones
        ascending = all(a <= b for a, b in itertools.pairwise(milestones)) and (not milestones or milestones[0] >= 0)
        _require(ascending, "milestones", "ascending, none inside the warm-up", milestones)
        _require(0 < self.gamma <= 1, "gamma", "above 0 and at most 1", self.gamma)
        _require_share(self.min_factor, "min_factor")

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        return max(self.min_factor, math.pow(self.gamma, bisect.bisect_right(self.milestones, step)))


@dataclass(frozen=True)
class Polynomial:
    """min_factor + (1 - min_factor) (1 - step/steps) ** power (https://arxiv.org/abs/1606.00915).

    Args:
        steps: length of the descent in steps; >= 1.
        power: above 0; 1 is linear, above 1 falls steeply at first.
        min_factor: the factor at the end and after it; 0 to 1.

    >>> Polynomial(10, power=2).factor(5)
    0.25
    """

    steps: float
    power: float
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        _require_horizon(self.steps)
        _require(0 < self.power < math.inf, "power", "above 0", self.power)
        _require_share(self.min_factor, "min_factor")

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        left = 1.0 - min(step / self.steps, 1.0)
        return self.min_factor + (1.0 - self.min_factor) * math.pow(left, self.power)


@dataclass(frozen=True)
class Triangular:
    """Linear from `min_factor` to 1 and back, `cycles` times (https://arxiv.org/abs/1506.01186).

    Args:
        steps: length of all cycles together, in steps; >= 1. torch's `CyclicLR(step_size_up=n)` has
            `steps = 2 n cycles`.
        cycles: how many; >= 1.
        min_factor: the factor at both ends of a cycle, and after the last; above 0 (a rate of 0 would waste the
            first step), at most 1.

    >>> [Triangular(8, cycles=2, min_factor=0.5).factor(step) for step in range(9)]
    [0.5, 0.75, 1.0, 0.75, 0.5, 0.75, 1.0, 0.75, 0.5]
    """

    steps: float
    cycles: int
    min_factor: float

    def __post_init__(self) -> None:
        _require_horizon(self.steps)
        _require(self.cycles >= 1 and self.cycles == int(self.cycles), "cycles", "a whole number >= 1", self.cycles)
        _require(0 < self.min_factor <= 1, "min_factor", "above 0 (where cycles begin) and at most 1", self.min_factor)

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        if step >= self.steps:
            return self.min_factor
        phase = step * self.cycles / self.steps % 1.0
        return self.min_factor + (1.0 - self.min_factor) * (1.0 - abs(2.0 * phase - 1.0))


@dataclass(frozen=True)
class OneCycle:
    """A cosine rise from `start_factor` to 1, then a cosine descent to `min_factor` (https://arxiv.org/abs/1708.07120).

    Only the learning rate is set; the momentum does not change.

    Args:
        steps: length of rise and descent together, in steps; >= 1.
        rise: length of the rise in steps; 0 to `steps`. torch's `OneCycleLR(total_steps, pct_start)` has
            `steps = total_steps - 1` and `rise = pct_start * total_steps - 1`.
        start_factor: the first factor; above 0, at most 1.
        min_factor: the factor at the end and after it; 0 to 1.

    >>> [OneCycle(10, rise=5, start_factor=0.5).factor(step) for step in (0, 5, 10)]
    [0.5, 1.0, 0.0]
    """

    steps: float
    rise: float
    start_factor: float = 0.04
    min_factor: float = 0.0

    def __post_init__(self) -> None:
        _require_horizon(self.steps)
        _require(0 <= self.rise <= self.steps, "lr_warmup", f"at most the total of {self.steps} steps", self.rise)
        _require(0 < self.start_factor <= 1, "start_factor", "above 0 and at most 1", self.start_factor)
        _require_share(self.min_factor, "min_factor")

    def factor(self, step: float) -> float:
        """The factor for the update with index `step`."""
        if step < self.rise:
            return self.start_factor + (1.0 - self.start_factor) * descent(step / self.rise, "cosine")
        if step >= self.steps:
            return self.min_factor
        return 1.0 + (self.min_factor - 1.0) * descent((step - self.rise) / (self.steps - self.rise), "cosine")


def rewarm_factor(step: int, start: int, steps: int) -> float:
    """Additional factor of a second warm-up, as after a rollback: (step - start + 1) / steps, at most 1.

    Args:
        step: index of the update.
        start: index of the first update of the second warm-up; before it the factor is 1.
        steps: its length in applied steps; 0 is none.

    >>> [rewarm_factor(step, start=10, steps=2) for step in (9, 10, 11, 12)]
    [1.0, 0.5, 1.0, 1.0]
    """
    return (step - start + 1) / steps if 0 <= step - start < steps else 1.0


def _require(ok: bool, argument: str, expected: str, got: object) -> None:
    require(ok, "schedule", argument, expected, got, "schedule")


def _require_share(value: float, argument: str) -> None:
    _require(0 <= value <= 1, argument, "from 0 to 1", value)


def _require_horizon(steps: float) -> None:
    _require(1 <= steps < math.inf, "total", "at least 1 step", steps)
