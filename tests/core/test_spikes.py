"""The detector of spikes, divergences, level shifts and non-finite steps, step by step, with exact events."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
from argument_ranges import check_range

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.limits import NO_LIMITS
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, replay
from stabletrain.core.spikes import Excursion, SpikeDetection, SpikeState


@dataclass(frozen=True, kw_only=True)
class Detector(SpikeDetection):
    """Defaults small enough for hand calculation."""

    plugin = "detector"
    slot = "spike"
    window: int = 8
    delay: int = 2
    min_samples: int = 4
    patience: int = 3
    regime_after: int = 3
    score_window: int = 100


RULE = Detector()
LOSS, NORM = 2.0, 1.0
"""The healthy level. It has no noise: the loss is an outlier above 2 + 6 * 0.02 * 2 = 2.24 and raised above 2.12, the
norm is an outlier above exp(6 * 0.05) = 1.35 and raised above exp(0.15) = 1.16."""
LOSS_LIMIT, NORM_LIMIT = 2.24, math.exp(0.3)


def outcome(step: int, loss: float = LOSS, norm: float = NORM, **change: Any) -> Outcome:
    return Outcome(step, loss, norm, norm, norm, **change)


def run(
    series: list[tuple[float, float]], state: SpikeState | None = None, rule: SpikeDetection = RULE, first: int = 10
) -> list[Observation[SpikeState]]:
    state = healthy() if state is None else state
    observations = []
    for step, (loss, norm) in enumerate(series, first):
        observations.append(rule.observe(state, outcome(step, loss, norm)))
        state = observations[-1].state
    return observations


def healthy(steps: int = 10, rule: SpikeDetection = RULE) -> SpikeState:
    state = rule.init()
    for step in range(steps):
        state, events, requests = rule.observe(state, outcome(step))
        assert (events, requests) == ((), ())
    return state


def events(series: list[tuple[float, float]], **arguments: Any) -> list[Event]:
    return [event for observation in run(series, **arguments) for event in observation.events]


def test_nothing_is_judged_before_delay_and_min_samples() -> None:
    """Bug: a delay or a minimum off by one, so that the first noisy steps of a run are spikes."""
    assert events([(9.0, 9.0)], state=healthy(5)) == []
    assert [event.kind for event in events([(9.0, 9.0)], state=healthy(6))] == ["spike"]


def test_a_spike_of_the_loss() -> None:
    """Bugs: a wrong number, limit or step in the record; the norm's spike reported beside the loss's."""
    text = "loss 7 > 2.24 (median 2 of 8 steps), step 1 of the excursion"
    (event,) = events([(7.0, 50.0)])
    assert event._replace(limit=0.0) == Event(10, "detector", "spike", 7.0, 0.0, text)
    assert event.limit == pytest.approx(LOSS_LIMIT)
    assert events([(7.0, NORM)], rule=Detector(name="mine"))[0].plugin == "mine"


def test_a_spike_of_the_norm() -> None:
    """Bug: the loss's value or limit in an event about the norm."""
    (event,) = events([(LOSS, 50.0)])
    text = "grad_norm 50 > 1.35 (median 1 of 8 steps), step 1 of the excursion"
    assert event._replace(limit=0.0) == Event(10, "detector", "spike", 50.0, 0.0, text)
    assert event.limit == pytest.approx(NORM_LIMIT)


def test_a_spike_of_the_norm_while_the_loss_is_raised() -> None:
    """Bugs: the norm's spike swallowed by the loss's excursion; or reported with the loss's numbers."""
    *_, event = events([(7.0, NORM), (2.2, 50.0)])
    text = "grad_norm 50 > 1.35 (median 1 of 8 steps), step 2 of the excursion"
    assert event._replace(limit=0.0) == Event(11, "detector", "spike", 50.0, 0.0, text)
    assert event.limit == pytest.approx(NORM_LIMIT)
    *_, last = run([(7.0, NORM), (7.0, NORM), (2.2, 50.0), (2.2, 50.0)])
    assert last.events == (), "after patience only divergences are reported"


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (7.0, "loss 7 > 2.24 (median 2 of 8 steps)"),
        (2.2, "loss 2.2 near the limit 2.24 (median 2 of 8 steps)"),
    ],
)
def test_a_divergence_and_its_request(loss: float, text: str) -> None:
    """Bugs: patience off by one; the wrong config key; no request, or one that names another plugin."""
    steps = run([(7.0, NORM), (7.0, NORM), (loss, NORM)])
    reason = f"{text}, not back within 3 steps (plugins.spike.patience=3)"
    assert [event.kind for step in steps[:2] for event in step.events] == ["spike", "spike"]
    assert [step.requests for step in steps[:2]] == [(), ()]
    (event,) = steps[2].events
    assert event._replace(limit=0.0) == Event(12, "detector", "divergence", loss, 0.0, reason)
    assert event.limit == pytest.approx(LOSS_LIMIT)
    assert steps[2].requests == (Request(RequestKind.ROLLBACK, "detector", reason),)


def test_a_divergence_is_repeated_and_after_a_window_its_level_is_learned() -> None:
    """Bugs: one report and then silence; spikes on top of the new level not seen; a new level without a record."""
    steps = run([(7.0, NORM)] * 9 + [(70.0, NORM)])
    kinds = [[event.kind for event in step.events] for step in steps]
    spike, divergence = ["spike"], ["divergence"]
    assert kinds == [spike, spike, divergence, [], [], divergence, [], ["regime"], [], spike]
    assert [len(step.requests) for step in steps] == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    (event,) = steps[7].events
    text = "loss raised for 8 steps: new level learned, 2 -> 7"
    assert event._replace(limit=0.0) == Event(17, "detector", "regime", 7.0, 0.0, text)
    assert event.limit == pytest.approx(LOSS_LIMIT)
    assert steps[7].state.loss_excursion == Excursion()


def test_a_new_level_of_the_norm() -> None:
    """Bugs: a higher norm taken for a divergence; regime_after off by one; the level not learned."""
    steps = run([(LOSS, 3.0), (LOSS, 4.0), (LOSS, 5.0), (LOSS, 4.0)])
    assert [[event.kind for event in step.events] for step in steps] == [["spike"], ["spike"], ["spike", "regime"], []]
    assert all(step.requests == () for step in steps)
    event = steps[2].events[1]
    text = "grad_norm raised for 3 steps, the loss within its limit: new level learned, 1 -> 4"
    assert (event.step, event.plugin, event.kind, event.reason) == (12, "detector", "regime", text)
    assert (event.value, event.limit) == pytest.approx((4.0, NORM_LIMIT))
    assert steps[2].state.norm_excursion == Excursion()


def test_a_raised_norm_continues_an_excursion_without_an_event() -> None:
    """Bug: a norm that alternates around its limit restarts the count for ever; or each step of it is a spike."""
    steps = run([(LOSS, 3.0), (LOSS, 1.2), (LOSS, 3.0)])
    assert [[event.kind for event in step.events] for step in steps] == [["spike"], [], ["spike", "regime"]]


def test_an_excursion_ends_below_the_midpoint() -> None:
    """Bug: `is_raised` with another share of the way than half."""
    for loss, norm, raised in ((2.13, NORM, True), (2.11, NORM, False)):
        after = run([(7.0, NORM), (loss, norm)])[-1].state
        assert (after.loss_excursion.steps, after.norm_excursion.steps) == (2 if raised else 0, 0)
    for norm, raised in ((math.exp(0.16), True), (math.exp(0.14), False)):
        after = run([(LOSS, 3.0), (LOSS, norm)])[-1].state
        assert (after.loss_excursion.steps, after.norm_excursion.steps) == (0, 2 if raised else 0)


def test_an_excursion_of_one_signal_ends_that_of_the_other() -> None:
    """Bug: a norm that was away before a loss spike is one step from a new level after it."""
    after = run([(LOSS, 3.0), (LOSS, 3.0), (7.0, 3.0)])[-1].state
    assert (after.loss_excursion, after.norm_excursion) == (Excursion(1, (7.0,)), Excursion())
    after = run([(7.0, NORM), (7.0, NORM), (LOSS, 3.0)])[-1].state
    assert (after.loss_excursion, after.norm_excursion) == (Excursion(), Excursion(1, (3.0,)))


def test_an_excursion_keeps_a_window_of_values() -> None:
    """Bug: a checkpoint that grows with the length of an excursion."""
    state = run([(7.0 + t, NORM) for t in range(7)])[-1].state
    assert state.loss_excursion == Excursion(7, tuple(7.0 + t for t in range(7)))
    long = Detector(patience=1, window=4, min_samples=2)
    levels = [step.state.loss_excursion for step in run([(7.0, NORM)] * 4, healthy(rule=long), long)]
    assert [(each.steps, len(each.values)) for each in levels] == [(1, 1), (2, 2), (3, 3), (0, 0)]


def test_only_accepted_steps_enter_the_baselines() -> None:
    """Bugs: a spike that raises its own limit; a step that another plugin skipped taken into the history."""
    state = healthy()
    for step in ((7.0, NORM), (LOSS, 3.0), (math.nan, NORM), (LOSS, math.inf)):
        after = run([step], state)[-1].state
        assert (after.loss, after.norm) == (state.loss, state.norm)
    skipped = RULE.observe(state, outcome(10, 2.05, 1.05, skipped=True))
    assert (skipped.state.loss, skipped.state.norm, skipped.events) == (state.loss, state.norm, ())
    applied = RULE.observe(state, outcome(10, 2.05, 1.05))
    assert applied.state.loss.past.waiting[-1] == 2.05
    assert applied.state.norm.past.waiting[-1] == pytest.approx(math.log(1.05))


def test_an_overflow_is_not_observed() -> None:
    """Bug: fp16 overflows that count as non-finite steps, or as steps of the score."""
    state = healthy()
    assert RULE.observe(state, outcome(10, LOSS, math.inf, overflow=True)) == Observation(state)


@pytest.mark.parametrize(
    ("loss", "norm", "value", "text"),
    [
        (math.nan, 1.5, math.nan, "loss nan, grad_norm 1.5"),
        (2.5, math.inf, math.inf, "loss 2.5, grad_norm inf"),
        (-math.inf, math.nan, -math.inf, "loss -inf, grad_norm nan"),
    ],
)
def test_a_nonfinite_step(loss: float, norm: float, value: float, text: str) -> None:
    """Bug: the finite one of the two signals reported as the cause."""
    (event,) = events([(loss, norm)])
    expected = Event(10, "detector", "nonfinite", value, math.nan, f"{text} (1 non-finite in a row)")
    assert repr(event) == repr(expected)


def test_nonfinite_steps_in_a_row() -> None:
    """Bugs: an event for every step of a run that is lost; a count off by one; a request without a reason."""
    steps = run([(math.nan, NORM)] * 7)
    assert [len(step.events) for step in steps] == [1, 0, 1, 0, 0, 1, 0]
    reason = "loss nan, grad_norm 1 ({} non-finite in a row)"
    requests = [step.requests for step in steps]
    expected = {n: (Request(RequestKind.ROLLBACK, "detector", reason.format(n)),) for n in (3, 6)}
    assert requests == [expected.get(n, ()) for n in range(1, 8)]
    assert steps[-1].state.nonfinite == 7
    for finite in ((LOSS, NORM), (7.0, NORM), (LOSS, 3.0)):
        assert run([finite], steps[-1].state)[0].state.nonfinite == 0


def test_a_nonfinite_step_neither_begins_nor_ends_an_excursion() -> None:
    """Bug: a divergence whose losses are NaN now and then is never reported."""
    bad = (math.nan, NORM)
    steps = run([(7.0, NORM), bad, (7.0, NORM), bad, (7.0, NORM)])
    assert [step.events[0].kind for step in steps] == ["spike", "nonfinite", "spike", "nonfinite", "divergence"]
    assert run([bad])[0].state.loss_excursion == Excursion()


def test_a_rollback_keeps_the_baselines_and_nothing_else() -> None:
    """Bug: an excursion or a count of before the rollback that goes on after it."""
    for series in ([(7.0, NORM)] * 2, [(LOSS, 3.0)] * 2, [(math.nan, NORM)] * 2):
        state = run(series)[-1].state
        expected = SpikeState(state.loss, state.norm, seen=state.seen, flagged=state.flagged, rise=state.rise)
        assert RULE.rebase(state, "divergence") == expected != state


def test_the_score_counts_flagged_steps_of_the_last_window() -> None:
    """Bugs: a window off by one; raised steps, which are no outliers, counted; an empty run divided by zero."""
    rule = Detector(score_window=4)
    assert rule.readings(rule.init()) == {}
    state = healthy(rule=rule)
    scores = []
    for step in run([(7.0, NORM), (2.2, NORM), (math.nan, NORM), (LOSS, 3.0)] + [(LOSS, NORM)] * 5, state, rule):
        scores.append(rule.readings(step.state)["spike_score"])
    assert scores == [0.25, 0.25, 0.5, 0.75, 0.5, 0.5, 0.25, 0.0, 0.0]
    young = RULE.observe(RULE.init(), outcome(0, math.nan)).state
    assert RULE.readings(young) == {"spike_score": 1.0}
    assert young.flagged == (0,)


def test_it_sets_no_limits_and_requests_only_where_asked() -> None:
    """Bug: a detector that acts although its plugin only reports."""
    assert RULE.limits(healthy()) is NO_LIMITS

    @dataclass(frozen=True, kw_only=True)
    class Silent(Detector):
        def requests_rollback(self) -> bool:
            return False

    steps = run([(7.0, NORM)] * 3, rule=Silent())
    assert [event.kind for event in steps[-1].events] == ["divergence"]
    assert steps[-1].requests == ()


@pytest.mark.parametrize(
    ("argument", "expected", "accepted", "refused"),
    [
        ("z_threshold", "> 0 and finite", [5e-324], [0.0, math.inf, math.nan]),
        ("delay", ">= 0", [0], [-1]),
        ("min_samples", "from 2 to window=8", [2, 8], [1, 9]),
        ("patience", "from 1 to window=8", [1, 8], [0, 9]),
        ("regime_after", "from 2 to window=8", [2, 8], [1, 9]),
        ("min_sigma_norm", "> 0 and finite", [5e-324], [0.0, math.inf, math.nan]),
        ("min_sigma_loss", ">= 0 and finite", [0.0], [-5e-324, math.inf, math.nan]),
        ("score_window", ">= 1", [1], [0]),
    ],
)
def test_ranges_of_the_arguments(argument: str, expected: str, accepted: list[Any], refused: list[Any]) -> None:
    """Bug: a range off by one, or a message with another name, range or key."""
    given, beyond = ([{argument: value} for value in values] for values in (accepted, refused))
    check_range(Detector, "detector", "plugins.spike", argument, expected, given, beyond)


def test_the_smallest_window() -> None:
    """Bug: a window without room for its delay or samples is accepted."""
    small = {"min_samples": 2, "patience": 2, "regime_after": 2}
    check_range(
        Detector, "detector", "plugins.spike", "window", ">= 2", [{**small, "window": 2}], [{**small, "window": 1}]
    )


def test_a_change_by_design_empties_the_baselines() -> None:
    """Bugs: the old level kept, or its excursion; the counts forgotten, so that announcements hide a run of NaN."""
    away = run([(math.nan, NORM), (9.0, NORM)], first=10)[-1].state
    nan = run([(9.0, NORM), (math.nan, NORM)], first=10)[-1].state
    for state in (away, nan):
        expected = SpikeState(nonfinite=state.nonfinite, seen=12, flagged=(10, 11))
        assert RULE.forget(state) == RULE.forget(RULE.forget(state)) == expected != state
    assert (away.nonfinite, nan.nonfinite) == (0, 1)


def test_a_replay_passes_expected_changes() -> None:
    """Bugs: a level that is expected reported as a divergence; a position counted from 1."""
    series = [(LOSS, NORM)] * 20 + [(9.0, NORM)] * 20
    for expect, quiet in (([20, "3ep"], True), ([12], False), ([21], False), (None, False)):
        events = [event for step in replay(Detector(expect=expect), series) for event in step.events]
        assert (not events) == quiet
