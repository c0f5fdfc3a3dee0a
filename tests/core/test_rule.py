"""The contract of a rule, tried on a small one of this file."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, dataclass
from typing import NamedTuple

import pytest

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.limits import Bound, Limits, SkipAbove
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule, replay
from stabletrain.errors import UserError


class Last(NamedTuple):
    norm: float | None = None


@dataclass(frozen=True)
class AtMostTheLast(Rule[Last]):
    """Bound every norm by the last one; drop a loss above ``max_loss``."""

    plugin = "at_most_the_last"
    slot = "clip"
    max_loss: float = 5.0

    def __post_init__(self) -> None:
        self.require(self.max_loss > 0, "max_loss", "> 0")

    def init(self) -> Last:
        return Last()

    def limits(self, state: Last) -> Limits:
        skip = Limits.of(SkipAbove("loss", self.max_loss))
        return skip if state.norm is None else skip | Limits.of(Bound(state.norm, state.norm))

    def observe(self, state: Last, outcome: Outcome) -> Observation[Last]:
        if outcome.skipped:
            event = Event(outcome.step, self.label, "skip", outcome.loss, self.max_loss, f"loss {outcome.loss}")
            return Observation(state, (event,), (Request(RequestKind.ROLLBACK, self.label, "loss"),))
        return Observation(Last(outcome.applied_norm))


def test_replay_runs_a_rule_as_a_guard_would() -> None:
    """Bugs: limits that know the step they judge; a dropped step with a norm; steps numbered from 1."""
    steps = list(replay(AtMostTheLast(), [(1.0, 2.0), (1.0, 3.0), (9.0, 1.0), (1.0, 1.5), (1.0, 5.0)]))
    assert [s.outcome.step for s in steps] == [0, 1, 2, 3, 4]
    assert [s.outcome.skipped for s in steps] == [False, False, True, False, False]
    applied = [s.outcome.applied_norm for s in steps]
    assert math.isnan(applied.pop(2))
    assert applied == [2.0, 2.0, 1.5, 1.5]
    assert [len(s.events) for s in steps] == [0, 0, 1, 0, 0]
    assert steps[2].requests[0].kind is RequestKind.ROLLBACK
    assert steps[1].outcome.clipped
    assert not steps[2].outcome.clipped


def test_replay_goes_on_from_a_state() -> None:
    """Bug: a given state that is ignored; or a falsy one taken for none."""
    (step,) = replay(AtMostTheLast(), [(1.0, 3.0)], Last(0.5))
    assert step.outcome.applied_norm == 0.5


def test_a_rule_is_a_value() -> None:
    """Bugs: hyper-parameters that change under way; a rule that cannot be copied or sent to another process."""
    rule = AtMostTheLast(max_loss=3.0, name="mine")
    with pytest.raises(FrozenInstanceError):
        rule.max_loss = 4.0  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(rule)) == rule == copy.deepcopy(rule)
    assert rule.label == "mine"
    assert AtMostTheLast().label == "at_most_the_last"
    assert rule.arguments() == {"max_loss": 3.0}
    assert rule.state_type() is Last
    assert rule.rebase(Last(1.0), "rollback") == Last(1.0)
    assert rule.forget(Last(1.0)) == rule.init()
    assert rule.expected_changes() == ()
    assert rule.readings(Last(1.0)) == {}


def test_a_rule_that_does_not_observe_keeps_its_state() -> None:
    """Bug: a default that clears the state of a rule with constant limits."""

    @dataclass(frozen=True)
    class Constant(AtMostTheLast):
        observe = Rule.observe

    assert Constant().observe(Last(2.0), Outcome(0, 1.0, 5.0, 5.0, 2.0)) == Observation(Last(2.0))


def test_a_refused_argument_names_its_key() -> None:
    """Bug: an error that does not say which key of the config to change."""
    with pytest.raises(UserError, match=r"max_loss must be > 0, got -1 \(\w+\(max_loss=\.\.\.\)\)"):
        AtMostTheLast(max_loss=-1)


@pytest.mark.parametrize(
    ("outcome", "applied", "clipped"),
    [
        (Outcome(0, 1.0, 2.0, 2.0, 2.0), True, False),
        (Outcome(0, 1.0, 2.0, 2.0, 1.0), True, True),
        (Outcome(0, 1.0, 4.0, 2.0, 2.0), True, True),
        (Outcome(0, 1.0, 2.0, 2.0, math.nan, skipped=True), False, False),
        (Outcome(0, 1.0, math.inf, math.inf, math.nan, overflow=True), False, False),
    ],
)
def test_applied_and_clipped(outcome: Outcome, applied: bool, clipped: bool) -> None:
    """Bug: a transform's work not counted, or a dropped step counted as clipped."""
    assert outcome.applied is applied
    assert outcome.clipped is clipped
