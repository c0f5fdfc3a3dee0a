"""AutoClip's vectors, the one step by which we differ from it, and its defects."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from argument_ranges import check_range

from stabletrain.core.events import Event
from stabletrain.core.limits import NO_LIMITS
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import replay
from stabletrain.core.state import from_plain, to_plain
from stabletrain.core.statistics import Window
from stabletrain_plugins.clip_percentile.rule import ClipPercentileRule, PercentileState

VECTORS = json.loads((Path(__file__).parents[3] / "tests" / "vectors" / "autoclip.json").read_text("utf-8"))
SEQUENCES = {name: [float(norm) for norm in norms] for name, norms in VECTORS["sequences"].items()}
SMOOTH = [case for case in VECTORS["cases"] if "nan" not in case["sequence"] and "inf" not in case["sequence"]]


def name(case) -> str:
    return f"p{case['params']['clip_percentile']}-{case['sequence']}"


def learn(rule: ClipPercentileRule, norms: list[float]) -> list[PercentileState]:
    states = [rule.init()]
    for t, norm in enumerate(norms):
        states.append(rule.observe(states[-1], Outcome(t, 2.0, norm, norm, norm)).state)
    return states


def applied(rule: ClipPercentileRule, norms: list[float]) -> list[float]:
    return [step.outcome.applied_norm for step in replay(rule, [(2.0, norm) for norm in norms])]


def threshold(rule: ClipPercentileRule, state: PercentileState) -> float:
    (bound,) = rule.limits(state).bounds
    return bound.above


@pytest.mark.parametrize("case", SMOOTH, ids=name)
def test_our_limit_for_the_next_step_is_the_references_limit_for_this_one(case):
    """Bug: another percentile or interpolation than the reference's."""
    # the reference counts the current norm in its own percentile; our limits come from history alone
    rule = ClipPercentileRule(percentile=case["params"]["clip_percentile"], regime_after=None)
    norms = SEQUENCES[case["sequence"]]
    for norm, state, expected in zip(norms, learn(rule, norms)[1:], case["post_norm"], strict=True):
        limit = threshold(rule, state)
        assert norm * min(1.0, limit / (norm + 1e-6)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("percentile", "largest"), [(10, 0.002), (50, 0.005)])
def test_on_a_steady_run_both_clip_to_nearly_the_same_norm(percentile, largest):
    """Bug: without the current norm in the history, a limit far from the reference's."""
    (case,) = (c for c in SMOOTH if c["params"]["clip_percentile"] == percentile and c["sequence"] == "steady")
    ours = applied(ClipPercentileRule(percentile=percentile), SEQUENCES["steady"])
    apart = [abs(mine / theirs - 1.0) for mine, theirs in zip(ours, case["post_norm"], strict=True)]
    assert max(apart[20:]) < largest


def test_a_new_maximum_is_clipped_here_and_passes_there():
    """Bug: the current norm counts in its own limit."""
    # at percentile 100 the reference cannot clip at all: every norm is at most the maximum that includes it
    (case,) = (c for c in SMOOTH if name(c) == "p100-single_spike_at_60")
    norms = SEQUENCES["single_spike_at_60"]
    assert case["post_norm"][60] == pytest.approx(8.0, rel=1e-6)
    assert applied(ClipPercentileRule(percentile=100), norms)[60] == max(norms[:60])


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_a_zero_or_nonfinite_norm_never_enters(bad):
    """Bug: a zero or non-finite norm changes later limits, or is itself changed."""
    # the reference stores NaN in its history: every later gradient is NaN
    rule, norms = ClipPercentileRule(), [3.0, 1.0, 2.0, 5.0]
    for position in range(len(norms) + 1):
        with_bad = [*norms[:position], bad, *norms[position:]]
        assert learn(rule, with_bad)[-1] == learn(rule, norms)[-1]
        result = applied(rule, with_bad)
        assert result.pop(position) == pytest.approx(bad, rel=0, abs=0, nan_ok=True)
        assert result == applied(rule, norms)


@pytest.mark.parametrize("sequence", ["nan_once_at_60", "inf_first_3_fp16_start"])
def test_the_references_lost_runs_go_on(sequence):
    """Bug: one NaN in the history makes every later gradient NaN."""
    (case,) = (c for c in VECTORS["cases"] if name(c) == f"p10-{sequence}")
    norms = SEQUENCES[sequence]
    ours = applied(ClipPercentileRule(), norms)
    assert "nan" in case["post_norm"]
    assert all(0.0 < mine <= norm for mine, norm in zip(ours, norms, strict=True) if math.isfinite(norm))
    assert sum(mine < norm for mine, norm in zip(ours, norms, strict=True)) > 90


def test_with_the_papers_percentile_nine_steps_in_ten_are_clipped():
    """Bug: the percentile is counted from the wrong end."""
    draw = random.Random(0)
    norms = [math.exp(0.3 * draw.gauss(0.0, 1.0)) for _ in range(2000)]
    steps = list(replay(ClipPercentileRule(), [(2.0, norm) for norm in norms]))
    assert sum(step.outcome.clipped for step in steps) / len(steps) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("factor", [1.5, 3.0])
@pytest.mark.parametrize("percentile", [10.0, 95.0])
def test_a_higher_level_is_learned_and_reported(factor, percentile):
    """Bug: after a change of level every step is clipped to the old one; or the change is not reported."""
    draw = random.Random(0)
    norms = [math.exp(0.06 * draw.gauss(0.0, 1.0)) for _ in range(1200)]
    norms = norms[:1000] + [factor * norm for norm in norms[1000:]]
    steps = list(replay(ClipPercentileRule(percentile=percentile), [(2.0, norm) for norm in norms]))
    (event,) = (event for step in steps for event in step.events)
    assert (event.step, event.kind, event.plugin) == (1019, "regime", "clip_percentile")
    assert event.value == pytest.approx(factor, rel=0.1)
    assert "20 steps in a row" in event.reason
    assert min(step.outcome.applied_norm for step in steps[1020:]) > 0.8 * factor
    late = [step.outcome.clipped for step in replay(ClipPercentileRule(regime_after=None), [(2.0, n) for n in norms])]
    assert all(late[1000:])  # without it, every step is clipped to the old level until the window is replaced


def test_the_window_is_bounded():
    """Bug: the history grows without end, or the newest norms are the ones dropped."""
    rule = ClipPercentileRule(percentile=50, window=3, regime_after=None)
    state = learn(rule, [100.0, 1.0, 2.0, 3.0])[-1]
    assert state.window.values == (1.0, 2.0, 3.0)
    assert threshold(rule, state) == 2.0


def test_nothing_is_clipped_during_the_warmup():
    """Bug: the warm-up is one step too long or too short."""
    rule = ClipPercentileRule(warmup_steps=3)
    states = learn(rule, [1.0, 2.0, 3.0])
    assert [rule.limits(state) == NO_LIMITS for state in states] == [True, True, True, False]


@pytest.mark.parametrize("change", [{"skipped": True}, {"overflow": True}])
def test_a_step_that_was_not_applied_is_not_learned(change):
    """Bug: norms of skipped steps or overflows change the limit."""
    rule = ClipPercentileRule()
    state = learn(rule, [1.0, 2.0])[-1]
    assert rule.observe(state, Outcome(2, 2.0, 50.0, 50.0, math.nan, **change)).state == state


def test_resumed_from_json_at_any_cut_equals_uninterrupted():
    """Bug: a part of the state, as the run of high norms, is lost in the checkpoint."""
    draw = random.Random(0)
    rule = ClipPercentileRule(percentile=90, window=40)
    norms = [math.exp(0.1 * draw.gauss(0.0, 1.0)) * (3.0 if t >= 60 else 1.0) for t in range(100)]
    states = learn(rule, norms)
    for cut, state in enumerate(states):
        again = from_plain(rule.state_type(), json.loads(json.dumps(to_plain(state))))
        for t, norm in enumerate(norms[cut:], cut):
            again = rule.observe(again, Outcome(t, 2.0, norm, norm, norm)).state
        assert again == states[-1]


def test_the_event_of_a_new_level_and_the_step_it_comes_at() -> None:
    """Bugs: a run that begins before there is a history of its length; a wrong limit or value in the record."""
    rule = ClipPercentileRule(percentile=50, window=10, regime_after=3, name="mine")
    state, events = rule.init(), []
    for step, norm in enumerate([1.0, 1.0, 1.0, 5.0, 6.0, 7.0]):
        state, new, _ = rule.observe(state, Outcome(step, 2.0, norm, norm, norm))
        events += new
    (event,) = events
    text = "grad_norm above 5.8 for 3 steps in a row: new level learned, median 1 -> 6"
    assert event == Event(5, "mine", "regime", 6.0, pytest.approx(5.8), text)
    assert state == PercentileState(Window((5.0, 6.0, 7.0), (5.0, 6.0, 7.0)))


@pytest.mark.parametrize("norm", [1.0, math.inf, math.nan])
def test_norms_that_are_not_high_make_no_new_level(norm: float) -> None:
    """Bugs: a constant norm reported as a new level again and again; infinite norms that count as high ones."""
    rule = ClipPercentileRule(window=10, regime_after=2)
    state = learn(rule, [1.0] * 5)[-1]
    for step in range(4):
        after = rule.observe(state, Outcome(step, 2.0, norm, norm, norm))
        assert (after.events, after.state.run) == ((), ())
        state = after.state


def test_a_level_is_new_above_the_percentile_that_is_clipped_to() -> None:
    """Bug: at percentile 100 the steps between the 95th percentile and the maximum are a new level."""
    rule = ClipPercentileRule(percentile=100, window=100, regime_after=2)
    state = learn(rule, [float(norm) for norm in range(100, 0, -1)])[-1]
    assert len(state.window) == 100
    for norm, high in ((99.9, False), (100.5, True)):
        assert bool(rule.observe(state, Outcome(0, 2.0, norm, norm, norm)).state.run) is high


def test_a_history_as_long_as_regime_after_is_enough() -> None:
    """Bug: at window == regime_after a new level is never learned."""
    rule = ClipPercentileRule(window=2, regime_after=2)
    assert [len(state.run) for state in learn(rule, [1.0, 1.0, 5.0, 6.0])] == [0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("argument", "expected", "accepted", "refused"),
    [
        ("percentile", "in [0, 100]", [0, 100], [-1e-9, 100.1, math.nan]),
        ("warmup_steps", "in [1, window=500]", [1, 500], [0, 501]),
        ("regime_after", "in [2, window=500] or None", [2, 500, None], [1, 501]),
    ],
)
def test_ranges_of_the_arguments(argument: str, expected: str, accepted: list[Any], refused: list[Any]) -> None:
    """Bug: a range off by one, or a message with another name, range or key."""
    given, beyond = ([{argument: value} for value in values] for values in (accepted, refused))
    check_range(ClipPercentileRule, "clip_percentile", "plugins.clip", argument, expected, given, beyond)


def test_the_smallest_window() -> None:
    """Bug: a window of one norm, which has no percentiles, is accepted."""
    small = {"regime_after": None}
    check_range(
        ClipPercentileRule,
        "clip_percentile",
        "plugins.clip",
        "window",
        ">= 2",
        [{**small, "window": 2}],
        [{**small, "window": 1}],
    )
