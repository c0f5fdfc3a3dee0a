"""Of several requests in one step the most severe is executed, whatever the order of plugins."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
from fits import HEALTHY, Net, RequestHandler, batches, fit

from stabletrain import TrainingStopped
from stabletrain.core.events import Request, RequestKind
from stabletrain.core.limits import Limits
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule
from stabletrain.runtime.guard.callbacks import as_callback
from stabletrain.runtime.guard.requests import execute


@dataclass(frozen=True)
class AskRule(Rule[None]):
    """Ask for something at step 1."""

    plugin = "ask"
    slot = "ask"

    kind: int = 1

    def init(self) -> None:
        return

    def limits(self, state: None) -> Limits:
        return Limits()

    def observe(self, state: None, outcome: Outcome) -> Observation[None]:
        asks = outcome.step == 1
        return Observation(state, (), (Request(RequestKind(self.kind), self.label, "because"),) if asks else ())


Ask = as_callback(AskRule)


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2])))
def test_the_most_severe_request_is_executed_alone(order: tuple[int, ...]) -> None:
    """Bugs: the first request executed instead of the severest; the milder one executed too, or left over."""
    handler = RequestHandler(RequestKind.ROLLBACK, RequestKind.REWARM)
    fit(Net(), batches(*[HEALTHY] * 4), *(Ask(kind=kind, name=f"ask{kind}") for kind in order), handler)
    assert [request.kind for request in handler.got] == [RequestKind.ROLLBACK]


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3])))
def test_a_stop_is_never_outranked(order: tuple[int, ...]) -> None:
    """Bug: a run that should end is rolled back instead, because a handler was there."""
    handler = RequestHandler(RequestKind.ROLLBACK, RequestKind.REWARM)
    with pytest.raises(TrainingStopped, match="ask3 stopped the run: because"):
        fit(Net(), batches(*[HEALTHY] * 4), *(Ask(kind=kind, name=f"ask{kind}") for kind in order), handler)
    assert handler.got == []


def test_a_rewarm_is_executed_by_the_guard_and_a_rollback_without_a_handler_stops() -> None:
    """Bugs: a run is stopped because no callback re-warms; a handler of other requests gets this one."""
    events: list[Any] = []
    climbs: list[Request] = []
    handler = RequestHandler(RequestKind.STOP)
    trainer = fit(Net(), batches(HEALTHY), handler)
    rewarm = Request(RequestKind.REWARM, "ask", "because", 5)
    execute([rewarm], trainer, Net(), events.append, climbs.append, 0)
    assert climbs == [rewarm]
    with pytest.raises(TrainingStopped):
        execute([Request(RequestKind.ROLLBACK, "ask", "because")], trainer, Net(), events.append, climbs.append, 7)
    (event,) = events
    assert (event.step, event.plugin, event.kind, event.reason) == (7, "ask", "stop", "because")
    assert math.isnan(event.value)
    assert climbs == [rewarm]
    assert handler.got == []
