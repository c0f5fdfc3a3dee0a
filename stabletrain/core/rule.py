"""The contract of a rule: a decision on scalars, in plain Python, that anybody can read, replay and test.

    limits(t) = rule.limits(state)            before the step, from history alone
    outcome   = the step, held to the limits of all rules
    state     = rule.observe(state, outcome)  after the step

A rule never sees a tensor, a Trainer or a file. Its public callback is derived by
`stabletrain.runtime.guard.callbacks.as_callback`: arguments, defaults and docstring are written once, in the rule.
"""

from __future__ import annotations

import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from stabletrain.core.events import Event, Request
from stabletrain.core.limits import Limits
from stabletrain.core.outcome import Outcome
from stabletrain.core.plugin import Plugin

S = TypeVar("S")


class Observation(NamedTuple, Generic[S]):
    """What a rule makes of an outcome: its next state, and what it has to say."""

    state: S
    events: tuple[Event, ...] = ()
    requests: tuple[Request, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rule(Plugin, ABC, Generic[S]):
    """Base of all rules: a frozen dataclass of hyper-parameters.

    A state is a named tuple of numbers, strings, tuples and further named tuples, or None for a rule without memory.

    Args:
        name: what events and checkpoints call this rule; needed when one run has two instances of a rule. Default:
            the plugin's own name, such as ``clip_norm``.
    """

    sees_overflow: ClassVar[bool] = False
    """It wants the outcomes of fp16 overflows too, which are nobody's history otherwise."""

    name: str | None = None

    @abstractmethod
    def init(self) -> S:
        """The state before the first step."""

    @abstractmethod
    def limits(self, state: S) -> Limits:
        """The limits of the next step, from history alone."""

    def observe(self, state: S, outcome: Outcome) -> Observation[S]:
        """Take an outcome into the history. Default: there is no history."""
        return Observation(state)

    def rebase(self, state: S, cause: str) -> S:
        """The state to go on with after a rollback, from the state at the time of the snapshot. Default: that one."""
        return state

    def readings(self, state: S) -> dict[str, float]:
        """Metrics of this rule, for the loggers; asked for when metrics are due. Default: none."""
        return {}

    def state_type(self) -> Any:
        """The type of the state, read from the annotation of `init`."""
        return typing.get_type_hints(type(self).init)["return"]


class Replayed(NamedTuple):
    """One step of a `replay`: what happened, and what the rule said."""

    outcome: Outcome
    events: tuple[Event, ...]
    requests: tuple[Request, ...]


def replay(rule: Rule[Any], series: Iterable[tuple[float, float]], state: Any = None) -> Iterator[Replayed]:
    """Run a rule alone over recorded signals, as a guard would.

    Args:
        rule: the rule.
        series: pairs of loss and raw gradient norm, one for each attempted step.
        state: where to begin; default: `Rule.init`.

    >>> from stabletrain_plugins.clip_norm.rule import ClipNormRule
    >>> [step.outcome.applied_norm for step in replay(ClipNormRule(max_norm=1.0), [(2.0, 0.5), (2.0, 8.0)])]
    [0.5, 1.0]
    """
    if state is None:
        state = rule.init()
    for step, (loss, grad_norm) in enumerate(series):
        limits = rule.limits(state)
        skipped = limits.skips_step(loss, grad_norm)
        applied_norm = math.nan if skipped else limits.hold(grad_norm)
        outcome = Outcome(step, loss, grad_norm, grad_norm, applied_norm, skipped=skipped)
        state, events, requests = rule.observe(state, outcome)
        yield Replayed(outcome, events, requests)
