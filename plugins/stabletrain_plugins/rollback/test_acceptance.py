"""Which repetition of an incident is accepted as a new level: decided from plain values."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stabletrain.core.events import Request, RequestKind
from stabletrain.core.outcome import Outcome
from stabletrain.core.spikes import SpikeState
from stabletrain_plugins.rollback.acceptance import (
    Accepting,
    IncidentLevel,
    LastRollback,
    Place,
    judge,
    remember,
    repeated,
)
from stabletrain_plugins.rollback.incidents import Incident, IncidentTracker
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Intervention
from stabletrain_plugins.rollback.new_level import accepted, level_of
from stabletrain_plugins.rollback.rollback_rule import RollbackRule
from stabletrain_plugins.rollback.weight_monitor import WeightProblem

PATIENCE, AFTER, COOL_DOWN = 20, 60, 100
LAST = LastRollback(attempted=535, restored=450, number=0)
EARLIER = Accepting((Place(applied=500, excess=1.0, rollback=0),))
"""The incident for which the last rollback was made."""


def incident(lasts: int = 0, excess: float = 1.0, **changes: Any) -> IncidentLevel:
    """An incident at applied step 500, attempted step 590, of a run whose loss is usually 2."""
    since = changes.pop("since", 590)
    losses = (2.0 + excess,) * min(lasts, PATIENCE)
    given = {"since": since, "applied": 500, "attempted": since + lasts, "losses": losses, "centre": 2.0, "margin": 0.1}
    return IncidentLevel(**{**given, **changes})


def place(level: IncidentLevel, rollback: int) -> Place:
    return Place(level.applied, level.excess(PATIENCE), rollback)


def verdict(level: IncidentLevel, memory: Accepting = EARLIER, last: LastRollback | None = LAST) -> str:
    return judge(level, memory, last, accept_after=AFTER, patience=PATIENCE, cool_down=COOL_DOWN).name.lower()


def test_no_level_is_accepted_before_it_has_been_judged() -> None:
    """Bug: ``accept`` shorter than ``patience`` accepts a level too early, or rolls back while it waits."""
    for lasts in range(PATIENCE + 1):
        found = judge(incident(lasts), EARLIER, LAST, accept_after=5, patience=PATIENCE, cool_down=COOL_DOWN)
        assert found.name == ("WAIT" if lasts < PATIENCE else "ACCEPT")


@pytest.mark.parametrize(("lasts", "expected"), [(0, "wait"), (20, "wait"), (59, "wait"), (60, "accept")])
def test_the_same_place_and_level_is_accepted_at_last(lasts: int, expected: str) -> None:
    """Bugs: one rollback after another for another loss term; a short burst of bad batches accepted."""
    assert verdict(incident(lasts)) == expected


def test_the_first_incident_is_rolled_back() -> None:
    """Bug: a divergence is accepted that going back would have undone."""
    assert verdict(incident(60), Accepting(), None) == "roll_back"


@pytest.mark.parametrize(("applied", "same"), [(489, False), (490, True), (510, True), (511, False)])
def test_another_place_is_another_incident(applied: int, same: bool) -> None:
    """Bug: a divergence is accepted because there was another one of this size, 11 steps away."""
    assert (verdict(incident(60, applied=applied)) == "accept") == same
    assert (verdict(incident(20, applied=applied)) == "roll_back") != same


@pytest.mark.parametrize(
    ("excess", "same"), [(0.49, False), (0.5, True), (2.0, True), (2.01, False), (0.1, False), (-1.0, False)]
)
def test_another_level_is_another_incident(excess: float, same: bool) -> None:
    """Bug: a loss is accepted that is far higher than that of the first incident: it diverges."""
    assert (verdict(incident(60, excess)) == "accept") == same
    assert (verdict(incident(20, excess)) == "wait") == same


@pytest.mark.parametrize("earlier", [0.09, 0.0, -0.3])
@pytest.mark.parametrize("now", [0.09, 0.01, -0.02])
def test_a_loss_that_is_not_raised_is_one_level(earlier: float, now: float) -> None:
    """Bug: incidents of the gradient norm are never the same, because the sign of the loss's noise differs."""
    memory = remember(place(incident(20, earlier), 0), Accepting())
    assert memory.places[0].excess == 0.0
    assert verdict(incident(60, now), memory) == "accept"
    assert verdict(incident(60, 0.2), memory) == "roll_back", "the loss is raised now"


def test_a_rollback_for_the_speed_of_the_weights_waits_for_the_loss() -> None:
    """Bugs: weights that move fast, since the loss has another level, cause a second rollback; or are accepted."""
    assert verdict(incident(20, by_speed=True)) == "wait"
    assert verdict(incident(60, by_speed=True)) == "wait"
    assert verdict(incident(60, by_speed=True, applied=700)) == "roll_back"


@pytest.mark.parametrize("change", [{"by_speed": True}, {"losses": ()}, {"centre": math.nan}])
def test_waiting_ends(change: dict[str, Any]) -> None:
    """Bug: requests are put off for ever, and with them the stop, where there is nothing to judge a level by."""
    assert verdict(incident(119, **change)) == "wait"
    assert verdict(incident(120, **change)) == "roll_back"


@pytest.mark.parametrize(
    ("since", "applied", "same"), [(535, 450, True), (555, 460, True), (556, 460, False), (555, 461, False)]
)
@pytest.mark.parametrize("lasts", [20, 60])
def test_an_incident_right_after_going_back_repeats_the_last_one(
    since: int, applied: int, same: bool, lasts: int
) -> None:
    """Bugs: a module that counts its own steps is rolled back again and again; or only as long as it began just now."""
    found = verdict(incident(lasts, since=since, applied=applied))
    assert found == ("roll_back" if not same else "wait" if lasts < AFTER else "accept")


def test_only_the_last_incident_is_repeated_right_after_going_back() -> None:
    """Bug: bad batches of an earlier burst, elsewhere, are trained on again because another level was accepted."""
    memory = Accepting((Place(100, None, 0), Place(500, 1.0, 1)))
    last = LAST._replace(number=1)
    assert repeated(incident(60, since=536, applied=451), memory, last, PATIENCE) == memory.places[1:]
    # the last rollback was for damaged weights, and no place was remembered
    assert repeated(incident(60, since=536, applied=451), memory, LAST._replace(number=2), PATIENCE) == ()


@pytest.mark.parametrize(
    ("applied", "lasts", "expected"),
    [
        (540, 19, "wait"),
        (540, 20, "accept"),
        (600, 20, "accept"),
        (601, 20, "roll_back"),
        (495, 20, "accept"),  # after a rollback from later on, the change is passed again
        (489, 20, "roll_back"),
    ],
)
def test_a_ramp_after_an_accepted_level_is_accepted_at_once(applied: int, lasts: int, expected: str) -> None:
    """Bug: a KL weight that rises for some hundred steps is rolled back, or dropped for 60 steps, at each rise."""
    level = incident(lasts, 50.0, applied=applied)
    assert verdict(level, Accepting(accepted=500)) == expected


def test_an_unknown_level_is_as_any_other() -> None:
    """Bug: an incident that was rolled back before its loss could be judged is never repeated."""
    memory = remember(place(incident(10), 0), Accepting())
    assert memory.places == (Place(500, None, 0),)
    assert verdict(incident(60, 17.0), memory) == "accept"


def test_the_memory_is_bounded() -> None:
    """Bug: a checkpoint that grows with each rollback."""
    memory = Accepting(accepted=3)
    for number in range(20):
        memory = remember(place(incident(20, applied=number), number), memory)
    assert [each.rollback for each in memory.places] == list(range(12, 20))
    assert memory.accepted == 3


def tracked(losses: list[float]) -> IncidentTracker:
    tracker = IncidentTracker(PATIENCE)
    tracker.current = Incident(90, 80, None)
    for step, loss in enumerate(losses, 90):
        tracker.on_outcome(False, Outcome(step, loss, 1.0, 1.0, math.nan, skipped=True), 80)
    return tracker


def test_a_level_needs_sound_weights_and_finite_steps() -> None:
    """Bug: damaged weights, or NaN for ever, are accepted as a new level: then nothing protects the run."""
    state, tracker = SpikeState(), tracked([3.0] * 30)
    assert level_of(tracker, state, 120, None) is not None
    assert level_of(tracker, state._replace(nonfinite=1), 120, None) is None
    assert level_of(tracker, state, 120, WeightProblem("damage", True, 110)) is None
    fast = level_of(tracker, state, 120, WeightProblem("fast", False, 110))
    assert fast is not None
    assert fast.by_speed
    tracker.close()
    assert level_of(tracker, state, 120, None) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 10, 29])
def test_nonfinite_losses_are_no_part_of_a_level(bad: float, position: int) -> None:
    """Bug: one NaN makes the median NaN, and every rule learns it."""
    losses = [3.0] * 30
    losses[position] = bad
    found = level_of(tracked(losses), SpikeState(), 120, None)
    assert found is not None
    assert found.losses == (3.0,) * PATIENCE


def test_the_usual_loss_is_known_before_there_is_a_limit() -> None:
    """Bug: "loss at 3 instead of 0": while there are too few values for a limit, the centre is not set."""
    rule = RollbackRule()
    state = rule.init()
    assert math.isnan(level_of(tracked([3.0]), state, 91, None).centre)  # type: ignore[union-attr]
    for step in range(60):
        state = rule.observe(state, Outcome(step, 2.0 + 0.01 * (step % 3), 1.0, 1.0, 1.0)).state
    found = level_of(tracked([3.0]), state, 91, None)
    assert found is not None
    assert (found.centre, found.margin) == (2.01, 0.0)
    for step in range(60, 130):
        state = rule.observe(state, Outcome(step, 2.0 + 0.01 * (step % 3), 1.0, 1.0, 1.0)).state
    found = level_of(tracked([3.0]), state, 131, None)
    assert found is not None
    assert state.loss.limit is not None
    assert found.margin == pytest.approx(0.5 * (state.loss.limit - 2.01))


def test_the_batches_of_the_refuted_rollbacks_alone_are_given_back() -> None:
    """Bug: batches of another incident are trained on again; or those of the refuted one are lost for ever."""

    def made(step: int, *batches: int) -> Intervention:
        excluded = tuple(("batch", 0, each) for each in batches)
        return Intervention(step, step - 20, None, (step, step - 20), excluded, (), 0, "restore", "p", "c")

    rollbacks = made(120, 100, 101), made(520, 500, 501), made(560, 501, 502)
    memory = Accepting((Place(100, 1.0, 0), Place(500, 1.0, 1), Place(500, 1.0, 2)))
    request = Request(RequestKind.ROLLBACK, "somebody", "loss 3 > 2.5")
    found = accepted(RollbackRule(rewarm=14), request, incident(60), memory, rollbacks, (1.0,) * PATIENCE, 501)
    expected = AcceptedLevel(
        step=650,
        applied=501,
        given_back=tuple(("batch", 0, each) for each in (500, 501, 502)),
        losses=(3.0,) * PATIENCE,
        norms=(1.0,) * PATIENCE,
        rewarm=7,
        level=3.0,
        was=2.0,
        cause="somebody: loss 3 > 2.5",
    )
    assert found == expected
    for part in ("at 3 instead of 2 ", "3 excluded batches are used again", "spike.expect", "spike.accept=null"):
        assert part in found.summary
    assert found.summary.endswith("somebody: loss 3 > 2.5")
