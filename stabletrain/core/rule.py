"""The interface of a rule: limits computed from past scalars, in plain Python without side effects.

    limits  = rule.limits(state)            before the step, from earlier steps only
    outcome = the step, clipped or skipped by the limits of all rules
    state   = rule.observe(state, outcome)  after the step

A rule has no access to tensors, the Trainer or files. `stabletrain.runtime.guard.callbacks.as_callback` derives its
public callback, so that arguments, defaults and docstring are written once, in the rule.
"""

from __future__ import annotations

import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from stabletrain.core.events import Event, Request
from stabletrain.core.lengths import Length, RunLength
from stabletrain.core.limits import Limits
from stabletrain.core.outcome import Outcome
from stabletrain.core.plugin import Plugin

S = TypeVar("S")


class Observation(NamedTuple, Generic[S]):
    """What `Rule.observe` returns: the next state, and the events and requests of the step."""

    state: S
    events: tuple[Event, ...] = ()
    requests: tuple[Request, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rule(Plugin, ABC, Generic[S]):
    """Base class of all rules: a frozen dataclass of hyper-parameters.

    A state is a named tuple of numbers, strings, tuples and further named tuples, or None for a rule without a state.

    Args:
        name: name in events and checkpoints; needed when one run has two instances of a rule. Default: the plugin's
            name, such as ``my_rule``.
    """

    sees_overflow: ClassVar[bool] = False
    """Whether `observe` is also called for fp16 overflows."""

    compares_loss: ClassVar[bool] = False
    """Whether the loss is compared with earlier ones. With several optimizers, which may train against each other, a
    higher loss of one is not worse: the rule then sees 0 instead of a finite loss."""

    name: str | None = None

    @abstractmethod
    def init(self) -> S:
        """The state before the first step."""

    @abstractmethod
    def limits(self, state: S) -> Limits:
        """The limits of the next step, computed from earlier steps only."""

    def observe(self, state: S, outcome: Outcome) -> Observation[S]:
        """Update the state with the outcome of a step. Default: the state does not change."""
        return Observation(state)

    def begin(self, state: S, run: RunLength, applied: int) -> S:
        """The state at the start of a fit, for a rule that depends on the run's length.

        Default: the same state.

        Args:
            state: of the checkpoint, or the initial one.
            run: what is known about the run's length.
            applied: applied steps of the run so far.
        """
        return state

    def rebase(self, state: S, cause: str) -> S:
        """The state after a rollback.

        Default: the state at the snapshot.

        Args:
            state: the state at the snapshot.
            cause: reason of the rollback.
        """
        return state

    def accept_level(self, state: S, losses: Sequence[float], norms: Sequence[float]) -> S:
        """The state after a new level of the loss turned out to be meant, because going back did not change it.

        Default: the state does not change.

        Args:
            state: the present state.
            losses: of the last steps, at the new level; at least one, all finite.
            norms: gradient norms of the same steps, finite.
        """
        return state

    def forget(self, state: S) -> S:
        """The state from which baselines are learned anew, because the training has changed by design.

        Default: the state before the first step. A rule keeps what no baseline is, such as a count of non-finite steps
        in a row. It is the same if it is called twice, and until a baseline is learned there is no limit from it.
        """
        return self.init()

    def expected_changes(self) -> tuple[Length, ...]:
        """Positions in the run, above 0, from which baselines of all rules are learned anew. Default: none.

        They are given in an argument ``expect``, which messages name.
        """
        return ()

    def readings(self, state: S) -> dict[str, float]:
        """Metrics for the loggers, by name; called when metrics are logged. Default: none."""
        return {}

    def state_type(self) -> Any:
        """The type of the state, read from the annotation of `init`."""
        return typing.get_type_hints(type(self).init)["return"]


class Replayed(NamedTuple):
    """One step of a `replay`: its outcome, and the rule's events and requests."""

    outcome: Outcome
    events: tuple[Event, ...]
    requests: tuple[Request, ...]


def replay(rule: Rule[Any], series: Iterable[tuple[float, float]], state: Any = None) -> Iterator[Replayed]:
    """Run one rule over recorded signals, as the guard does in training.

    Of the `Rule.expected_changes` those are passed that are given in steps: the length of the run is not known.

    Args:
        rule: the rule.
        series: pairs of loss and raw gradient norm, one for each attempted step.
        state: initial state; default: `Rule.init`.

    >>> from stabletrain.core.limits import Bound
    >>> class AtMostOne(Rule[None]):
    ...     plugin, slot = "at_most_one", "clip"
    ...     def init(self): return None
    ...     def limits(self, state): return Limits.of(Bound(above=1.0, target=1.0))
    >>> [step.outcome.applied_norm for step in replay(AtMostOne(), [(2.0, 0.5), (2.0, 8.0)])]
    [0.5, 1.0]
    """
    if state is None:
        state = rule.init()
    changes, applied = {length.value for length in rule.expected_changes() if length.unit == "steps"}, 0
    for step, (loss, grad_norm) in enumerate(series):
        if applied in changes:
            state = rule.forget(state)
        limits = rule.limits(state)
        skipped = limits.skips_step(loss, grad_norm)
        applied += not skipped
        applied_norm = math.nan if skipped else limits.clip(grad_norm)
        outcome = Outcome(step, loss, grad_norm, grad_norm, applied_norm, skipped=skipped)
        state, events, requests = rule.observe(state, outcome)
        yield Replayed(outcome, events, requests)
