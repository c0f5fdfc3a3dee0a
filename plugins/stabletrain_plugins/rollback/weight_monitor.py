"""Checks the weights every few steps, for damage that neither loss nor gradient has shown yet."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor

from stabletrain.runtime.guard.signals import SignalCopy
from stabletrain.runtime.ranks import Ranks
from stabletrain_plugins.rollback.weight_check import WeightCheck


class WeightSample(NamedTuple):
    """The weights at one step.

    Args:
        step: attempted steps so far.
        norms: of each tensor; empty if they must not be compared with later ones.
        lr: the largest learning rate at that step.
    """

    step: int
    norms: tuple[float, ...]
    lr: float


class WeightHistory(NamedTuple):
    """Earlier samples of the weights; part of a checkpoint.

    Args:
        last: the last regular sample.
        before: the regular sample before it.
        speeds: between consecutive regular samples of healthy steps, see `speed`; oldest first.
    """

    last: WeightSample | None = None
    before: WeightSample | None = None
    speeds: tuple[float, ...] = ()


_MAX_SPEEDS, _MIN_SPEEDS = 16, 8
"""Maximum number of speeds in the history, and the number needed before a new one is compared with them."""


class WeightProblem(NamedTuple):
    """What is wrong with the weights.

    Args:
        reason: one sentence.
        damaged: the size of the weights is wrong; else only the speed at which they move.
        good_at: attempted steps at the last regular check, which found no damage; 0: there was none.
    """

    reason: str
    damaged: bool
    good_at: int = 0


class _Started(NamedTuple):
    """A check whose norms the device still computes, perhaps.

    Args:
        step: attempted steps so far.
        norms: reads them.
        lr: the largest learning rate at that step.
        due: it is a regular check.
        unhealthy: the last steps were not healthy.
    """

    step: int
    norms: Callable[[], tuple[float, ...]]
    lr: float
    due: bool
    unhealthy: bool


class WeightMonitor:
    """Checks the weights every few attempted steps, and in an incident; all ranks get the same answer.

    The speed of the weights, relative to the learning rate, usually changes slowly. If the last steps were unhealthy,
    and the speed is more than six times the median and more than twice the largest of the last speeds, then earlier
    updates have damaged the weights; the batch is not the cause. A high speed without an unhealthy step is not damage:
    it also occurs in a new phase of the training, such as a warm restart.

    Args:
        check: compares norms.
        every: attempted steps between regular samples, >= 1.
        history: continue from it; norms that cannot be compared with those of ``check`` are dropped.
    """

    def __init__(self, check: WeightCheck, every: int, history: WeightHistory = WeightHistory()) -> None:  # noqa: B008
        self._check, self._every = check, every
        comparable = all(check.can_compare(sample.norms) for sample in history[:2] if sample and sample.norms)
        self._history = history if comparable else _without_norms(history)
        self._started: _Started | None = None
        self._unsaid: tuple[WeightProblem | None, WeightProblem, WeightHistory] | None = None
        """What this rank has found in a check, what is said if only another rank has found something, and the history
        before it."""

    @property
    def history(self) -> WeightHistory:
        """For the checkpoint: if a problem was found that nobody knows yet, as before, so that it is found again."""
        self._finish()
        return self._unsaid[2] if self._unsaid and self._unsaid[0] else self._history

    def drop_started(self) -> None:
        """Forget a check whose norms are not read yet: after an exception, since the device may be lost."""
        self._started = None

    def check(
        self, trainer: Trainer, step: int, unhealthy: bool = False, lr_factor: float = 1.0, later: bool = False
    ) -> WeightProblem | None:
        """The problem with the weights; None if there is none or no check is due. A collective.

        Args:
            trainer: in a fit.
            step: attempted steps so far.
            unhealthy: the last steps were not healthy: check now, also the speed.
            lr_factor: on the learning rates within a step, as while they climb again after a rollback.
            later: the host does not wait for the device: the next call returns the problem, unless ``unhealthy``.
        """
        self._finish()
        if self._unsaid and (problem := self._agreed(trainer)):
            return problem
        last = self._history.last
        due = step // self._every != (last.step if last else 0) // self._every
        if not (due or unhealthy):
            return None
        others, retrained = self._check.refresh()
        if others:
            self.forget_norms()
        if retrained:
            self.forget_speeds()
        later = later and not unhealthy
        norms = _read_later(self._check.unread_norms()) if later else self._check.norms
        self._started = _Started(step, norms, lr_factor * _largest_lr(trainer), due, unhealthy)
        if later:
            return None
        self._finish()
        return self._agreed(trainer)

    def _finish(self) -> None:
        """Read the norms of a check that was started, and compare them with those before."""
        started, self._started = self._started, None
        if started is None:
            return
        before = self._history
        last, _, speeds = before
        now = WeightSample(started.step, started.norms(), started.lr)
        good_at = last.step if last else 0
        damage = self._check.problem(now.norms, last.norms if last else ())
        problem = None if damage is None else WeightProblem(damage, True, good_at)
        if problem is None and started.unhealthy and (too_fast := self._too_fast(now)):
            problem = WeightProblem(too_fast, False, good_at)
        if started.due:
            if last is not None and problem is None and not started.unhealthy:
                speeds = (*speeds, *_known(speed(now, last)))[-_MAX_SPEEDS:]
            self._history = WeightHistory(now, last, speeds)
        unknown = WeightProblem("weights are damaged, or move too fast, on another rank", False, good_at)
        self._unsaid = problem, unknown, before

    def _agreed(self, trainer: Trainer) -> WeightProblem | None:
        """The problem of a check that is finished, the same answer on all ranks. A collective."""
        assert self._unsaid is not None
        (problem, unknown, _), self._unsaid = self._unsaid, None
        ranks = Ranks(trainer)
        if not ranks.any(problem is not None):
            return None
        anywhere = ranks.any(problem is not None and problem.damaged)
        return (problem or unknown)._replace(damaged=anywhere)

    def forget_norms(self) -> None:
        """After a restore: do not compare the restored weights with those of the undone steps."""
        self._started = self._unsaid = None
        self._history = _without_norms(self._history)

    def forget_speeds(self) -> None:
        """After a change of the training by design: do not compare new speeds with those before it."""
        self._finish()
        self._history = self._history._replace(speeds=())

    def _too_fast(self, now: WeightSample) -> str | None:
        speeds = self._history.speeds[:-1]  # the last regular sample may have come after the damage
        if len(speeds) < _MIN_SPEEDS:
            return None
        usual = statistics.median(speeds)
        limit = max(6.0 * usual, 2.0 * max(speeds))
        fastest = max((each for then in self._history[:2] if then for each in _known(speed(now, then))), default=0.0)
        if not fastest > limit > 0.0:
            return None
        return (
            f"the weights have changed {fastest / usual:.3g} times as fast as usual (limit {limit / usual:.3g}), and "
            "the last steps were not healthy"
        )


def speed(now: WeightSample, then: WeightSample) -> float | None:
    """The speed of the weights between two samples, relative to their size and to the learning rate; None if unknown.

    It is the change of the norms, divided by the square root of the number of steps, by which it is assumed to grow.

    >>> speed(WeightSample(14, (3.0, 4.5), 0.1), WeightSample(10, (3.0, 4.0), 0.05))
    0.5
    """
    lr, size, steps = max(now.lr, then.lr), math.hypot(*then.norms), now.step - then.step
    if not (now.norms and lr > 0.0 and size > 0.0 and steps > 0):
        return None
    return math.dist(now.norms, then.norms) / size / math.sqrt(steps) / lr


def _read_later(norms: Tensor | None) -> Callable[[], tuple[float, ...]]:
    copy = None if norms is None else SignalCopy(norms)
    return lambda: () if copy is None else tuple(copy.read())


def _without_norms(history: WeightHistory) -> WeightHistory:
    last, before = (each._replace(norms=()) if each else None for each in history[:2])
    return WeightHistory(last, before, history.speeds)


def _known(value: float | None) -> tuple[float, ...]:
    return () if value is None else (value,)


def _largest_lr(trainer: Trainer) -> float:
    return max((float(group.get("lr", 1.0)) for each in trainer.optimizers for group in each.param_groups), default=1.0)
