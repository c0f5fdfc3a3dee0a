"""Looking at the weights themselves: damage that neither loss nor gradient has shown yet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain.runtime.snapshots.buffers import plain_tensors


class WeightCheck:
    """Compares the norm of each parameter with what it was.

    A tensor is damaged when its norm is not finite, or its root mean square has grown more than ``max_growth`` times
    beyond both its own and the whole model's of then: a tensor that began with zeros may grow to be like the others.

    Args:
        names: of the parameters.
        parameters: the parameters; of sharded ones, this rank's part is looked at.
        max_growth: largest healthy factor, > 1.

    >>> weights = [torch.ones(4), torch.zeros(4)]
    >>> check = WeightCheck(["a", "b"], weights, max_growth=10.0)
    >>> then = check.norms()
    >>> weights[1].fill_(3.0), check.problem(check.norms(), then)
    (tensor([3., 3., 3., 3.]), None)
    >>> weights[1][0] = 100.0
    >>> check.problem(check.norms(), then)
    'the norm of b went from 0 to 100.1, more than 10 times what weights here are like'
    """

    def __init__(self, names: Sequence[str], parameters: Sequence[Tensor], max_growth: float) -> None:
        known = [(name, p, _judged(p)) for name, p in zip(names, parameters, strict=True)]
        self._parameters = [p for _, p, tensors in known if tensors]
        self._names = [name for name, _, tensors in known for _ in tensors]
        self._sizes = [tensor.numel() for _, _, tensors in known for tensor in tensors]
        self._max_growth = max_growth

    def can_compare(self, norms: Sequence[float]) -> bool:
        """Whether norms of another process are of the same tensors: no rank has only a part of its own."""
        return len(norms) == len(self._sizes) and not any(isinstance(p, DTensor) for p in self._parameters)

    def norms(self) -> tuple[float, ...]:
        """The norm of each tensor now; waits for the device once."""
        tensors = [tensor for parameter in self._parameters for tensor in _judged(parameter)]
        if not tensors:
            return ()
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)
        where = norms[0].device
        return tuple(torch.stack([n if n.device == where else n.to(where) for n in norms]).tolist())

    def problem(self, now: Sequence[float], then: Sequence[float]) -> str | None:
        """What is wrong, in one sentence; None if nothing is.

        Args:
            now: of `norms`.
            then: the same of an earlier, healthy moment; empty: only finite numbers are asked for.
        """
        for name, norm in zip(self._names, now, strict=True):
            if not math.isfinite(norm):
                return f"the norm of {name} is {norm}"
        usual = math.hypot(*then) / math.sqrt(sum(self._sizes)) if then else 0.0
        if not usual:
            return None
        for name, norm, before, size in zip(self._names, now, then, self._sizes, strict=True):
            if norm > self._max_growth * max(before, usual * math.sqrt(size)):
                return (
                    f"the norm of {name} went from {before:.4g} to {norm:.4g}, more than {self._max_growth:g} times "
                    "what weights here are like"
                )
        return None


def _judged(parameter: Tensor) -> list[Tensor]:
    return [each for each in plain_tensors((parameter,)) if each.is_floating_point() and each.numel()]


class WeightSample(NamedTuple):
    """What a look at the weights sees.

    Args:
        step: attempted steps before it.
        norms: of each tensor; empty if they are not to be compared with.
        lr: the largest learning rate, as it is set.
    """

    step: int
    norms: tuple[float, ...]
    lr: float


class WeightHistory(NamedTuple):
    """What was seen of the weights so far.

    Args:
        last: the last look that was due.
        before: the one before.
        speeds: from one look to the next, see `speed`; the last ones, of healthy steps.
    """

    last: WeightSample | None = None
    before: WeightSample | None = None
    speeds: tuple[float, ...] = ()


_SPEEDS, _ENOUGH = 16, 8
"""Speeds that are remembered, and how many of them are needed to judge another one."""


class WeightMonitor:
    """Looks at the weights every few attempted steps; one rank's damage is everybody's.

    At a given learning rate, a run's weights move at a speed that changes slowly. When a step is not healthy and they
    have moved six times as fast as usual, and twice as fast as in any of the last looks, the last updates are the
    cause, not the step's batch. Speed alone is no damage: it is as well a new phase of the training.

    Args:
        check: compares norms.
        every: attempted steps from one look to the next, >= 1.
        seen: goes on from there; norms of other tensors than these are left out.
    """

    def __init__(self, check: WeightCheck, every: int, seen: WeightHistory = WeightHistory()) -> None:  # noqa: B008
        self._check, self._every = check, every
        comparable = all(check.can_compare(look.norms) for look in seen[:2] if look and look.norms)
        self.seen = seen if comparable else _without_norms(seen)
        """For the checkpoint."""

    def look(self, trainer: Trainer, step: int, suspicious: bool = False) -> str | None:
        """What is wrong, if a look is due; None if nothing is. A collective.

        Args:
            trainer: in a fit.
            step: attempted steps so far.
            suspicious: look now, and compare with the last looks that were due: the last step was not healthy, and if
                the weights are the cause, every further step is wasted.
        """
        last, _, speeds = self.seen
        due = step // self._every != (last.step if last else 0) // self._every
        if not (due or suspicious):
            return None
        now = WeightSample(step, self._check.norms(), _learning_rate(trainer))
        problem = self._check.problem(now.norms, last.norms if last else ())
        if problem is None and suspicious:
            problem = self._too_fast(now)
        if due:
            if last is not None and problem is None and not suspicious:
                speeds = (*speeds, *_known(speed(now, last)))[-_SPEEDS:]
            self.seen = WeightHistory(now, last, speeds)
        if trainer.world_size > 1:
            damaged = trainer.strategy.reduce_boolean_decision(problem is not None, all=False)
            problem = problem or ("weights are damaged on another rank" if damaged else None)
        return problem

    def begin_anew(self) -> None:
        """The weights of an earlier step were put back: sizes are not compared with those of now."""
        self.seen = _without_norms(self.seen)

    def _too_fast(self, now: WeightSample) -> str | None:
        speeds = self.seen.speeds[:-1]  # the last look that was due may have come after the damage
        if len(speeds) < _ENOUGH:
            return None
        usual = statistics.median(speeds)
        limit = max(6.0 * usual, 2.0 * max(speeds))
        fastest = max((each for then in self.seen[:2] if then for each in _known(speed(now, then))), default=0.0)
        if not fastest > limit > 0.0:
            return None
        return (
            f"the weights have moved {fastest / usual:.3g} times as fast as usual (limit {limit / usual:.3g}), and the "
            "last step was not healthy"
        )


def speed(now: WeightSample, then: WeightSample) -> float | None:
    """How fast the weights moved between two looks, in shares of their size at learning rate 1.

    Movement is taken from the norms, and to grow with the square root of the steps. None if it is not known.

    >>> speed(WeightSample(14, (3.0, 4.5), 0.1), WeightSample(10, (3.0, 4.0), 0.05))
    0.5
    """
    rate, size, steps = max(now.lr, then.lr), math.hypot(*then.norms), now.step - then.step
    if not (now.norms and rate > 0.0 and size > 0.0 and steps > 0):
        return None
    return math.dist(now.norms, then.norms) / size / math.sqrt(steps) / rate


def _without_norms(seen: WeightHistory) -> WeightHistory:
    last, before = (each._replace(norms=()) if each else None for each in seen[:2])
    return WeightHistory(last, before, seen.speeds)


def _known(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)


def _learning_rate(trainer: Trainer) -> float:
    return max((float(group.get("lr", 1.0)) for each in trainer.optimizers for group in each.param_groups), default=1.0)
