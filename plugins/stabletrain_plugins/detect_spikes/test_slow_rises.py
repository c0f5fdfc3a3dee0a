"""Slow rises, levels and losses that do not fall, as the whole detector reports them; also in small trainings."""

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, EventRecorder, Net, batches, fit, loader

from stabletrain import DetectSpikes
from stabletrain.core.lengths import RunLength
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import replay
from stabletrain.core.spikes import SpikeState
from stabletrain.core.state import from_plain, to_plain
from stabletrain.testing.series import Series
from stabletrain_plugins.detect_spikes.rule import DetectSpikesRule

VECTORS = Path(__file__).parents[3] / "tests" / "vectors"
RULE = DetectSpikesRule()


def slow_rise() -> Series:
    """A training of a small language model whose loss creeps from 2.67 to 4.44 in steps 300 to 500."""
    with open(VECTORS / "slow_rise.csv", newline="", encoding="utf-8") as file:
        return [(float(row["loss"]), float(row["grad_norm"])) for row in csv.DictReader(file)]


def level(*parts: tuple[int, float], sigma: float = 0.02, seed: int = 0) -> Series:
    draw = random.Random(seed)
    return [(loss + sigma * draw.gauss(0, 1), math.exp(0.1 * draw.gauss(0, 1))) for n, loss in parts for _ in range(n)]


def slow(series: Series) -> list[int]:
    """Steps at which a slow rise is reported."""
    steps = replay(RULE, series)
    return [event.step for step in steps for event in step.events if "slowly" in event.reason]


# ---- recorded and generated series ----------------------------------------------------------------------------------


def test_a_loss_that_creeps_up_is_one_divergence() -> None:
    """Bugs: 1.8 nats in 200 steps are no event; or an event at every step; no cause; a rollback nobody asked for."""
    steps = list(replay(RULE, slow_rise()))
    (event,) = (event for step in steps for event in step.events)
    assert (event.kind, event.plugin) == ("divergence", "detect_spikes")
    assert 300 < event.step < 350
    assert event.value > event.limit > 1.05 * 2.59
    assert event.reason == (
        f"the loss has risen slowly: mean of the last 20 steps {event.value:.4g} > {event.limit:.4g}, 5 steps in a row "
        "(lowest mean 2.592 at step 293)"
    )
    assert [request for step in steps for request in step.requests] == []
    rollback = DetectSpikesRule(on_divergence="rollback")
    assert [request for step in replay(rollback, slow_rise()) for request in step.requests] == []


def test_a_level_that_was_reported_and_learned_is_no_slow_rise() -> None:
    """Bug: after a jump of 25 % and its `regime` event, the same level is reported once more."""
    assert slow(level((500, 2.0), (500, 2.5))) == []


def test_a_plateau_one_per_cent_higher_is_no_event() -> None:
    """Bug: 6 standard errors alone are a rise."""
    series = level((500, 1.96), (500, 1.98), sigma=0.005)
    assert [event for step in replay(RULE, series) for event in step.events] == []


def test_a_loss_of_rounding_errors_that_begins_to_grow() -> None:
    """Bug: a policy gradient's loss, 0 until a penalty grows, is a slow rise of 1e-10, or of its first level."""
    draw = random.Random(0)
    zeros = [(1e-10 * draw.gauss(0, 1), 1.0) for _ in range(300)]
    assert slow([*zeros, *((1e-6 * i, 1.0) for i in range(1, 400))]) == []


def test_a_burst_is_no_slow_rise() -> None:
    """Bug: outliers, or steps on the way back from them, raise the mean."""
    for length in (1, 10, 19):
        assert slow(level((300, 2.0), (length, 4.0), (300, 2.0))) == []
    recovery = [(2.0 + 2.0 * math.exp(-i / 8), 1.0) for i in range(100)]
    assert slow([*level((300, 2.0)), *recovery, *level((300, 2.0), seed=1)]) == []


def test_after_an_announced_change_the_new_level_counts() -> None:
    """Bug: a level that was accepted is reported, or a rise from it is not."""
    state = RULE.init()
    for step in replay(RULE, level((300, 2.0))):
        state = RULE.observe(state, step.outcome).state
    for losses in ((), [2.16] * 100):
        told = RULE.at_new_level(state, losses)
        after = [*level((300, 2.16), seed=1), *((2.16 + 0.002 * i, 1.0) for i in range(200))]
        found = [e.step for step in replay(RULE, after, told) for e in step.events if "slowly" in e.reason]
        assert len(found) == 1
        assert found[0] > 300


# ---- what is learned, and checkpoints -------------------------------------------------------------------------------


def test_nan_infinities_and_skipped_steps_leave_no_trace_at_any_position() -> None:
    """Bugs: NaN in a mean, for ever; a dropped loss counts; a row that a NaN breaks."""
    series = slow_rise()[200:350]
    known = RULE.begin(RULE.init(), RunLength(total_steps=500), 0)

    def end(bad: Outcome | None, at: int) -> tuple[Any, Any]:
        state, found = known, []
        for step, (loss, norm) in enumerate(series):
            if bad is not None and step == at:
                state = RULE.observe(state, bad).state
            state, events, _ = RULE.observe(state, Outcome(step, loss, norm, norm, norm))
            found += [event for event in events if "slowly" in event.reason]
        return (state.rise, state.learning), found

    expected = end(None, 0)
    assert len(expected[1]) == 1
    for at in range(0, len(series), 3):
        for value in (math.nan, math.inf, -math.inf):
            assert end(Outcome(at, value, 1.0, 1.0, math.nan, skipped=True), at) == expected
            assert end(Outcome(at, 2.0, value, value, math.nan), at) == expected
        assert end(Outcome(at, 2.7, 1.0, 1.0, math.nan, skipped=True), at) == expected
        assert end(Outcome(at, 2.7, math.inf, math.inf, math.nan, overflow=True), at) == expected


def test_resumed_at_any_cut_is_as_uninterrupted() -> None:
    """Bug: the row, the lowest mean, or the check of a tenth of the run is not in the checkpoint."""
    series, run = slow_rise()[220:350], RunLength(total_steps=600)

    def go_on(state: SpikeState, first: int, last: int) -> tuple[SpikeState, list[Any]]:
        found: list[Any] = []
        for step, (loss, norm) in enumerate(series[first:last], first):
            state, events, _ = RULE.observe(state, Outcome(step, loss, norm, norm, norm))
            found += events
        return state, found

    start = RULE.begin(RULE.init(), run, 0)
    whole = go_on(start, 0, len(series))
    assert [event.kind for event in whole[1]] == ["not_learning", "divergence"]
    for cut in range(len(series)):
        state, before = go_on(start, 0, cut)
        restored = from_plain(RULE.state_type(), json.loads(json.dumps(to_plain(state))))
        assert restored == state
        state, after = go_on(RULE.begin(restored, run, cut), cut, len(series))
        assert (state, before + after) == whole


# ---- a loss that does not fall --------------------------------------------------------------------------------------


def not_learning(series: Series, total: int | None, applied: int = 0) -> list[Any]:
    steps = replay(RULE, series, RULE.begin(RULE.init(), RunLength(total_steps=total), applied))
    return [event for step in steps for event in step.events if event.kind == "not_learning"]


def test_a_loss_that_has_not_fallen_is_one_event() -> None:
    """Bugs: at another step than a tenth of the run; repeated; a reason without its numbers; a rollback of it."""
    (event,) = not_learning(level((1000, 2.3)), total=1000)
    assert event.step == 99
    assert event.reason.startswith("the loss has not fallen in the first 100 steps: at first 2.292, lowest mean of 20")
    assert not_learning(level((1000, 2.3)), total=None) == []
    assert not_learning(level((200, 2.3), (800, 2.2)), total=2500) == []


def test_what_a_run_continues_from_is_not_its_first_value() -> None:
    """Bug: a run that resumes without the detector's state has "not fallen" since the resume."""
    assert not_learning(level((1000, 2.3)), total=1000, applied=500) == []


def test_a_new_level_is_not_compared_with_the_first_value() -> None:
    """Bug: a run whose loss rose by design within its first tenth has "not fallen"."""
    state = RULE.begin(RULE.init(), RunLength(total_steps=1000), 0)
    assert RULE.at_new_level(state).learning.due is None


@pytest.mark.parametrize("trained", [True, False])
def test_a_training_knows_its_own_length(trained: bool) -> None:
    """Bugs: the rule is never told how long the run is; the event does not reach the callbacks."""
    model, recorder = Net(), EventRecorder()
    if not trained:
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        model.net[4].requires_grad_(False)
    fit(model, loader(batches(*[HEALTHY] * 30)), DetectSpikes(), recorder, max_epochs=10)
    found = [event for event in recorder.events if event.kind == "not_learning"]
    assert len(found) == (0 if trained else 1)
    assert all(event.step == 29 for event in found)
