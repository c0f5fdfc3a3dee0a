import dataclasses
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from argument_ranges import check_range

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.limits import SkipAbove, SkipBelow
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Replayed, replay
from stabletrain.core.state import from_plain, to_plain
from stabletrain.errors import UserError
from stabletrain_plugins.skip_outliers.rule import OutlierState, SkipOutliersRule

Series = list[tuple[float, float]]
DEFAULT = SkipOutliersRule()
STRICT = SkipOutliersRule(tolerance=0.0)
SHORT = SkipOutliersRule(window=16, min_samples=8, regime_after=4, max_in_a_row=6)
CONF = Path(__file__).parent / "conf" / "plugins" / "outliers"
VECTORS = json.loads(
    (Path(__file__).parents[3] / "tests" / "vectors" / "olmo_skipstep_decisions.json").read_text(),
    parse_constant=float,
)


def run(rule: SkipOutliersRule, series: Series) -> list[Replayed]:
    return list(replay(rule, series))


def skipped(steps: list[Replayed]) -> list[int]:
    return [step.outcome.step for step in steps if step.outcome.skipped]


def kinds(steps: list[Replayed], kind: str) -> list[int]:
    return [step.outcome.step for step in steps if any(event.kind == kind for event in step.events)]


def requests(steps: list[Replayed]) -> list[int]:
    return [step.outcome.step for step in steps if step.requests]


def last_state(rule: SkipOutliersRule, series: Series) -> OutlierState:
    state: OutlierState = rule.init()
    for step in run(rule, series):
        state = rule.observe(state, step.outcome).state
    return state


def steady(seed: int, steps: int, sigma: float = 0.1, level: float = 0.8) -> Series:
    r = random.Random(seed)
    return [(2.5 * (1 + 0.03 * r.gauss(0, 1)), level * math.exp(sigma * r.gauss(0, 1))) for _ in range(steps)]


def healthy(kind: str, seed: int, steps: int = 2000) -> Iterator[tuple[float, float]]:
    r = random.Random(seed)
    for t in range(steps):
        a, b = r.gauss(0, 1), r.gauss(0, 1)
        match kind:
            case "steady":
                yield 2.5 + 0.08 * a, 0.8 * math.exp(0.1 * b)
            case "decay":
                yield (2 + 8 * math.exp(-t / 100)) * (1 + 0.02 * a), (0.5 + 5 * math.exp(-t / 150)) * math.exp(0.2 * b)
            case "drift":
                yield 2.5 * (1 + 0.03 * a) * (1 + t / steps), math.exp(2 * t / steps + 0.2 * b)
            case "lognormal":
                yield 2.5 + 0.1 * a, math.exp(b)
            case "lognormal loss":
                yield math.exp(a), math.exp(b)
            case "converging":
                yield 3 * math.exp(-t / 400 + 0.7 * a), math.exp(-t / 400 + 0.7 * b)
            case "negative loss":
                yield -3 + 0.5 * a, math.exp(0.3 * b)
            case "constant":
                yield 2.0, 1.0


HEALTHY = ["steady", "decay", "drift", "lognormal", "lognormal loss", "converging", "negative loss", "constant"]


# ---- it does not drop healthy steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEALTHY)
def test_no_healthy_step_is_dropped(kind: str) -> None:
    # a limit in linear space alone drops 3 % of log-normal losses, those of a classifier near its end
    assert skipped(run(DEFAULT, list(healthy(kind, seed=0)))) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", HEALTHY)
def test_no_healthy_step_is_dropped_with_20_seeds(kind: str) -> None:
    """Bug: as above, in rarer draws."""
    assert sum(len(skipped(run(DEFAULT, list(healthy(kind, seed))))) for seed in range(20)) == 0


def test_only_zeros_are_no_scale_to_judge_by() -> None:
    # a limit of 0 from a converged hinge loss would drop every later step
    series = [(0.0, 0.0)] * 100 + [(0.1, 0.3)] * 100
    assert skipped(run(DEFAULT, series)) == []


def test_a_zero_norm_is_neither_history_nor_outlier() -> None:
    """Bug: the logarithm of 0; or zeros halve the level, so that ordinary norms are outliers."""
    series = [pair for each in steady(0, 200) for pair in (each, (2.5, 0.0))]
    steps = run(DEFAULT, series)
    assert skipped(steps) == []
    assert skipped(run(STRICT, [*series, (2.5, 8.0)])) == [len(series)]


# ---- it catches what it claims --------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [10.0, 100.0])
@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.3])
def test_a_gradient_of_wrong_scale_is_dropped(sigma: float, factor: float) -> None:
    for seed in range(5):
        series = steady(seed, 300, sigma)
        for at in (64, 65, 128, 299):
            faulty = [(loss, factor * norm if t == at else norm) for t, (loss, norm) in enumerate(series)]
            steps = run(STRICT, faulty)
            # where the norm happens to be 2.5 sigmas low, ten times it is still 4.9 sigmas high: no claim below 6
            if math.log(factor * series[at][1] / 0.8) > 8 * sigma + 0.5:
                assert skipped(steps) == [at]


def test_a_loss_spike_is_dropped_though_the_norm_is_normal() -> None:
    """Bug: a step is dropped only if both signals are outliers."""
    series = steady(1, 300)
    series[200] = (4.5, series[200][1])
    assert skipped(run(STRICT, series)) == [200]


def test_a_burst_is_dropped() -> None:
    # OLMo's statistics take the first spikes in, and are blind to the rest
    series = steady(2, 300)
    series[200:210] = [(7.0, 2.5)] * 10
    assert skipped(run(DEFAULT, series)) == list(range(201, 210))
    assert skipped(run(STRICT, series)) == list(range(200, 210))
    assert len(skipped(run(SkipOutliersRule.olmo(), series))) < 10
    assert skipped(run(SkipOutliersRule.olmo(keep_outliers=False), series)) == list(range(200, 210))


def test_spikes_in_the_warmup_do_not_widen_the_limits() -> None:
    """Bug: outliers of the warm-up widen the limits, and later faults pass."""
    series = steady(3, 200)
    series[10], series[30], series[150] = (50.0, 400.0), (50.0, 400.0), (7.0, 20.0)
    assert skipped(run(STRICT, series)) == [150]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", [SHORT, SkipOutliersRule.olmo(window=20, max_in_a_row=6)], ids=["default", "olmo"])
def test_a_nonfinite_step_at_any_position_is_as_if_it_had_not_been(rule: SkipOutliersRule, bad: float) -> None:
    """Bug: a non-finite loss or norm enters the history or the counts."""
    series = steady(4, 80)
    series[50:53] = [(7.0, 30.0)] * 3
    without = [step.outcome.skipped for step in run(rule, series)]
    for at in range(len(series) + 1):
        for pair in ((bad, 1.0), (2.0, bad), (bad, bad)):
            steps = run(rule, [*series[:at], pair, *series[at:]])
            decisions = [step.outcome.skipped for step in steps]
            assert not decisions.pop(at), "skip_nonfinite drops it, not this rule"
            assert decisions == without


def test_the_largest_floats_overflow_nowhere() -> None:
    """Bug: a sum or square of large values becomes infinite, and no limit is left."""
    for rule in (SHORT, SkipOutliersRule.olmo(window=20), dataclasses.replace(SHORT, log_norm=False)):
        for value in (1.7e308, 5e-324, 1e200):
            state = rule.init()
            for step in run(rule, [(value, value), (1.0, value), (-value, 1.0)] * 20):
                state = rule.observe(state, step.outcome).state
            json.dumps(to_plain(state), allow_nan=False)


# ---- a new level of the norm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0, 10.0])
@pytest.mark.parametrize("sigma", [0.02, 0.0676, 0.1, 0.2, 0.3])
def test_a_new_level_of_the_norm_is_learned(sigma: float, factor: float) -> None:
    # ZClip stays locked in for ever. With sigma 0.0676 a factor of 1.5 lies at the limit: half the steps are above it
    for seed in range(4):
        after = steady(seed + 100, 400, sigma, level=0.8 * factor)
        steps = run(DEFAULT, steady(seed, 300, sigma) + after)
        assert len(skipped(steps)) <= DEFAULT.regime_after
        assert not requests(steps)
        learned = kinds(steps, "regime")
        if sigma <= 0.1 and factor >= 10:
            assert learned == [300 + DEFAULT.regime_after - 1]
        for at in learned:
            level = next(event for event in steps[at].events if event.kind == "regime")
            assert level.value == pytest.approx(0.8 * factor, rel=0.35)
            assert str(DEFAULT.regime_after) in level.reason


def test_it_protects_at_once_after_learning_a_level() -> None:
    """Bug: after a new level is learned, faults pass until the history is full again."""
    series = steady(5, 300) + steady(6, 60, level=8.0)
    at = 300 + DEFAULT.regime_after
    for rule, first in ((STRICT, 300), (DEFAULT, 301)):
        for fault in ((2.5, 80.0), (7.0, 8.0)):
            faulty = [*series[:at], fault, *series[at:]]
            assert skipped(run(rule, faulty)) == list(range(first, at + 1))


def test_a_raised_loss_is_no_new_level() -> None:
    # re-learning a divergence would bless it
    steps = run(DEFAULT, steady(7, 300) + [(7.0, 8.0)] * 40)
    assert kinds(steps, "regime") == []
    assert requests(steps) == [300 + DEFAULT.max_in_a_row - 1]


def test_one_raised_loss_among_the_candidates_resets_the_count() -> None:
    """Bug: norms of a divergence count as candidates for a new level."""
    shift = [(2.5, 8.0)] * 15
    steps = run(dataclasses.replace(DEFAULT, max_in_a_row=100), steady(7, 300) + shift + [(7.0, 8.0)] + shift * 2)
    assert kinds(steps, "regime") == [300 + 16 + 19]


def test_without_regime_after_a_new_level_is_a_reason_to_give_up() -> None:
    """Bug: with ``regime_after=None`` a new level is learned, or skipped for ever."""
    rule = SkipOutliersRule(regime_after=None)
    steps = run(rule, steady(8, 300) + steady(9, 50, level=8.0))
    assert kinds(steps, "regime") == []
    assert requests(steps) == [329]


def test_the_loss_decides_about_a_new_level_also_where_only_the_norm_is_watched() -> None:
    """Bug: with ``signals='grad_norm'`` a divergence is learned as a new level."""
    rule = SkipOutliersRule(signals="grad_norm")
    assert requests(run(rule, steady(10, 300) + [(7.0, 8.0)] * 40)) == [329]
    steps = run(rule, steady(10, 300) + [(7.0, 8.0)] * 40)
    assert kinds(steps, "regime") == []
    assert all("loss" not in event.reason for step in steps for event in step.events)
    assert kinds(run(rule, steady(10, 300) + [(2.5, 8.0)] * 40), "regime") == [319]


# ---- dropped steps in a row -----------------------------------------------------------------------------------------


def test_too_many_in_a_row_ask_for_a_rollback_with_the_number() -> None:
    """Bug: a request one step early or late, at every further step, or without numbers."""
    steps = run(DEFAULT, steady(11, 100) + [(9.0, 0.8)] * 70)
    assert requests(steps) == [129, 159]
    (request,) = steps[129].requests
    assert request.kind is RequestKind.ROLLBACK
    assert "30 outliers in a row" in request.reason
    assert "loss 9" in request.reason


def test_an_applied_step_ends_the_row_and_a_nonfinite_one_does_not() -> None:
    """Bug: steps that are not in a row are counted together; or a NaN among outliers starts the count again."""
    bad = (9.0, 0.8)
    base = steady(11, 100)
    assert requests(run(DEFAULT, base + [bad] * 29 + [base[0]] + [bad] * 29)) == []
    assert requests(run(DEFAULT, base + [bad] * 29 + [(math.nan, 1.0)] + [bad])) == [130]


def test_a_step_dropped_by_another_rule_is_no_history() -> None:
    """Bug: values of skipped steps or overflows enter the history or the counts."""
    state = last_state(DEFAULT, steady(12, 100))
    other = Outcome(100, 2.5, 0.8, 0.8, math.nan, skipped=True)
    overflow = Outcome(100, 2.5, 0.8, 0.8, math.nan, overflow=True)
    assert DEFAULT.observe(state, other) == (state, (), ())
    assert DEFAULT.observe(state, overflow) == (state, (), ())


def test_events_name_the_values_and_limits() -> None:
    """Bug: an event without the values that it is about."""
    steps = run(STRICT, [*steady(13, 100), (9.0, 33.0)])
    (event,) = steps[-1].events
    assert (event.kind, event.value, event.plugin, event.step) == ("skip", 9.0, "skip_outliers", 100)
    assert event.limit < 4
    assert "loss 9 >" in event.reason
    assert "grad_norm 33 >" in event.reason
    assert "(1 in a row)" in event.reason


def test_a_rollback_ends_the_row_and_keeps_the_history() -> None:
    """Bug: outliers of before a rollback count towards the next request; or the rollback deletes the history."""
    state = last_state(DEFAULT, steady(13, 100) + [(2.5, 33.0)] * 5)
    assert (state.in_a_row, state.outside, state.heat) == (5, 5, 3.0)
    rebased = DEFAULT.rebase(state, "spike")
    assert (rebased.in_a_row, rebased.candidates, rebased.outside, rebased.heat) == (0, (), 0, 0.0)
    assert (rebased.loss, rebased.norm, rebased.share) == (state.loss, state.norm, state.share)


@pytest.mark.parametrize(
    ("signals", "watched"), [("both", {"loss", "grad_norm"}), ("loss", {"loss"}), ("grad_norm", {"grad_norm"})]
)
def test_only_the_chosen_signals_are_limited(signals: Any, watched: set[str]) -> None:
    """Bug: ``signals`` has no effect, or limits come before ``min_samples`` steps."""
    rule = SkipOutliersRule(signals=signals, tolerance=0.0)
    state = last_state(rule, steady(14, 63))
    assert rule.limits(state).skips == frozenset()
    state = rule.observe(state, Outcome(63, 2.5, 0.8, 0.8, 0.8)).state
    skips = rule.limits(state).skips
    assert {skip.signal for skip in skips if isinstance(skip, SkipAbove)} == watched
    assert any(isinstance(skip, SkipBelow) for skip in skips) == ("loss" in watched)


# ---- OLMo-core ------------------------------------------------------------------------------------------------------


def olmo(case: dict[str, Any]) -> tuple[SkipOutliersRule, Series]:
    params, with_norms = case["params"], case["with_grad_norms"]
    rule = SkipOutliersRule.olmo(
        window=params.get("rolling_interval_length", 128),
        sigmas=params.get("sigma_factor", 6.0),
        signals="both" if with_norms else "loss",
    )
    losses = [float(loss) for loss in VECTORS["losses"][case["sequence"]]]
    norms = VECTORS["grad_norms"] if with_norms else [1.0] * len(losses)
    return rule, list(zip(losses, norms, strict=True))


def named(case: dict[str, Any]) -> str:
    return f"{case['sequence']}-{case['params']}-{'norm' if case['with_grad_norms'] else 'loss'}"


FINITE = [case for case in VECTORS["cases"] if not case["sequence"].startswith("nan")]
NAN = [case for case in VECTORS["cases"] if case["sequence"].startswith("nan")]


@pytest.mark.parametrize("case", FINITE, ids=named)
def test_olmo_decides_as_the_reference(case: dict[str, Any]) -> None:
    """Bug: other steps are dropped than by OLMo-core."""
    rule, series = olmo(case)
    assert skipped(run(rule, series)) == case["skipped_steps"]


@pytest.mark.parametrize("case", NAN, ids=named)
def test_olmo_is_not_blocked_by_one_nan_as_the_reference_is(case: dict[str, Any]) -> None:
    """Bug: a NaN in the history makes every limit NaN, and each step of half a window is dropped."""
    rule, series = olmo(case)
    at = next(t for t, (loss, _) in enumerate(series) if math.isnan(loss))
    assert len(case["skipped_steps"]) > rule.window // 2
    healthy_case = next(c for c in FINITE if {**c, **{k: case[k] for k in ("params", "with_grad_norms")}} == c)
    assert healthy_case["sequence"] == "decaying_loss"
    assert skipped(run(rule, series)) == [t for t in healthy_case["skipped_steps"] if t != at]


def test_the_default_drops_the_whole_plateau_that_the_reference_accepts() -> None:
    """Bug: dropped losses enter the history, and a divergence is accepted."""
    case = next(c for c in FINITE if c["sequence"].startswith("divergence") and c["with_grad_norms"])
    assert case["skipped_steps"][:5] == [300, 301, 302, 303, 350]
    _, series = olmo(case)
    steps = run(DEFAULT, series)
    assert skipped(steps) == list(range(301, 400))
    assert skipped(run(STRICT, series)) == list(range(300, 400))
    assert requests(steps) == [329, 359, 389]


# ---- state and configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [SHORT, dataclasses.replace(SHORT, tolerance=0.0), SkipOutliersRule.olmo(window=20, max_in_a_row=6)],
    ids=["default", "strict", "olmo"],
)
def test_resumed_at_any_cut_equals_uninterrupted(rule: SkipOutliersRule) -> None:
    # the reference saves no history: a resumed run is unprotected for half a window
    series = (
        steady(15, 40) + [(7.0, 9.0)] * 8 + steady(16, 10) + steady(17, 30, level=8.0) + [(math.nan, 1.0), (7.0, 90.0)]
    )
    whole = run(rule, series)
    assert len({event.kind for step in whole for event in step.events}) == (2 if rule.robust else 1)
    for cut in range(len(series)):
        state = rule.init()
        for step in whole[:cut]:
            state = rule.observe(state, step.outcome).state
        state = from_plain(OutlierState, json.loads(json.dumps(to_plain(state), allow_nan=False)))
        resumed = list(replay(rule, series[cut:], state))
        for before, after in zip(whole[cut:], resumed, strict=True):
            assert repr(before.outcome._replace(step=0)) == repr(after.outcome._replace(step=0))
            assert [e.reason for e in before.events] == [e.reason for e in after.events]
            assert before.requests == after.requests


@pytest.mark.parametrize(("option", "rule"), [("skip", DEFAULT), ("olmo", SkipOutliersRule.olmo())])
def test_an_option_file_says_what_the_rule_does(option: str, rule: SkipOutliersRule) -> None:
    """Bug: an option file with other defaults than the code."""
    node = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    assert node.pop("_target_") == "stabletrain.SkipOutliers"
    assert node == {**rule.arguments(), "name": None}


def test_the_preset_has_the_published_defaults() -> None:
    """Bug: a default of the preset that is not OLMo's, or an argument that goes nowhere."""
    common: dict[str, Any] = {
        "tolerance": 0.0,
        "robust": False,
        "log_norm": False,
        "min_sigma_norm": 0.0,
        "min_sigma_loss": 0.0,
    }
    published = SkipOutliersRule(
        window=128, min_samples=63, keep_outliers=True, regime_after=None, max_in_a_row=30, **common
    )
    assert SkipOutliersRule.olmo() == published
    other = SkipOutliersRule.olmo(
        sigmas=5.0, window=30, signals="loss", keep_outliers=False, max_in_a_row=7, name="mine"
    )
    common |= {"sigmas": 5.0, "window": 30, "min_samples": 19, "signals": "loss", "regime_after": 6, "max_in_a_row": 7}
    assert other == SkipOutliersRule(name="mine", **common)
    assert other.arguments() == SkipOutliersRule(**common).arguments()
    assert SkipOutliersRule.olmo(keep_outliers=False).regime_after == 20
    assert [SkipOutliersRule.olmo(window=window).min_samples for window in (20, 41, 43)] == [19, 19, 20]


def test_the_preset_with_too_few_steps_for_a_new_level_names_its_own_argument() -> None:
    """Bug: an error about ``regime_after``, which the preset does not have."""
    message = r"^skip_outliers: max_in_a_row must be > regime_after=2, got 2 \(SkipOutliers\(max_in_a_row=\.\.\.\)\)"
    with pytest.raises(UserError, match=message):
        SkipOutliersRule.olmo(keep_outliers=False, max_in_a_row=2)
    assert SkipOutliersRule.olmo(keep_outliers=False, max_in_a_row=3).regime_after == 2
    assert SkipOutliersRule.olmo(max_in_a_row=1).regime_after is None


def test_the_event_of_a_new_level() -> None:
    """Bugs: a wrong step, plugin, value or limit in the record."""
    rule = dataclasses.replace(SHORT, name="mine")
    event = run(rule, [(2.0, 1.0)] * 8 + [(2.0, 5.0), (2.0, 6.0), (2.0, 7.0), (2.0, 8.0)])[-1].events[1]
    limit = math.exp(6 * 0.2)
    text = "grad_norm above 3.32 in 4 steps, the loss within its limit: new level learned, 1 -> 6.481"
    expected = Event(11, "mine", "regime", math.sqrt(42.0), limit, text)
    assert event == expected._replace(value=pytest.approx(expected.value), limit=pytest.approx(limit))


@pytest.mark.parametrize(
    ("loss", "norm", "value", "limit", "reason"),
    [
        (9.0, 1.0, 9.0, 2.24, "loss 9 > 2.24 (median 2 of 8 steps)"),
        (2.0, 9.0, 9.0, math.exp(1.2), "grad_norm 9 > 3.32 (median 1 of 8 steps)"),
        (9.0, 9.0, 9.0, 2.24, "loss 9 > 2.24 (median 2 of 8 steps) and grad_norm 9 > 3.32 (median 1 of 8 steps)"),
    ],
)
def test_the_event_and_the_request_of_dropped_steps(
    loss: float, norm: float, value: float, limit: float, reason: str
) -> None:
    """Bugs: the limit of the other signal; a request one step early or late, or without the last reason."""
    rule = dataclasses.replace(SHORT, regime_after=None, max_in_a_row=3, name="mine")
    applied, first, second = run(rule, [(2.0, 1.0)] * 8 + [(loss, norm)] * 3)[-3:]
    assert applied.events == ()
    for step, in_a_row in ((first, 2), (second, 3)):
        (event,) = step.events
        text = f"{reason}: step skipped ({in_a_row} in a row)"
        assert event == Event(7 + in_a_row, "mine", "skip", value, pytest.approx(limit), text)
    assert first.requests == ()
    text = f"3 outliers in a row (plugins.outliers.max_in_a_row=3); last: {reason}"
    assert second.requests == (Request(RequestKind.ROLLBACK, "mine", text),)


def test_the_event_of_a_rule_for_the_norm_alone_does_not_name_the_loss() -> None:
    """Bug: a signal without a limit given as the reason of a skip."""
    rule = dataclasses.replace(SHORT, signals="grad_norm", tolerance=0.0)
    (event,) = run(rule, [(2.0, 1.0)] * 8 + [(9.0, 9.0)])[-1].events
    assert (event.value, event.reason) == (9.0, "grad_norm 9 > 3.32 (median 1 of 8 steps): step skipped (1 in a row)")


def test_a_rule_for_the_loss_alone_does_not_judge_the_norm() -> None:
    """Bugs: the norm, whose level tells a loss of rounding size, gets a limit or a bound, or raises the tolerance."""
    rule = dataclasses.replace(SHORT, signals="loss")
    healthy = [(2.0, norm) for norm in (1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 9.0, 1.0)]
    for heat in (0.0, 3.0):
        state = last_state(rule, [*healthy, (2.0, 9.0)])._replace(heat=heat)
        assert (state.in_a_row, state.share) == (0, 0.0)
        assert {skip.signal for skip in rule.limits(state).skips if isinstance(skip, SkipAbove)} <= {"loss"}
        assert rule.limits(state).clip(9.0) == 9.0


def test_the_preset_names_the_mean() -> None:
    """Bug: a reason that gives the mean as the median."""
    series = [(2.0 + 0.1 * (t % 2), 1.0 + 0.1 * (t % 2)) for t in range(64)]
    (event,) = run(SkipOutliersRule.olmo(), [*series, (9.0, 1.0)])[-1].events
    assert "(mean 2.05 of 64 steps)" in event.reason


def test_a_raised_loss_and_a_request_discard_the_candidates() -> None:
    """Bug: norms of a divergence, or of before a rollback, that become a new level later."""
    rule = dataclasses.replace(SHORT, max_in_a_row=6)
    state = last_state(rule, [(2.0, 1.0)] * 8 + [(2.0, 9.0)] * 2)
    assert (state.candidates, state.outside) == ((9.0, 9.0), 2)
    raised = rule.observe(state, Outcome(10, 9.0, 9.0, 9.0, math.nan, skipped=True)).state
    assert (raised.candidates, raised.outside, raised.in_a_row) == ((), 0, 3)
    last = rule.observe(state._replace(in_a_row=5), Outcome(10, 2.0, 9.0, 9.0, math.nan, skipped=True))
    assert (last.state.candidates, last.state.outside, last.state.in_a_row) == ((), 0, 0)
    assert len(last.requests) == 1


def test_a_norm_near_the_limit_keeps_the_candidates_and_one_below_does_not() -> None:
    """Bug: a shift of the level as far as the limit, of which half of the steps are dropped for a whole window."""
    state = SHORT.init()
    series = [(2.0, 1.0)] * 8 + [(2.0, 5.0), (2.0, 3.0), (2.0, 5.0), (2.0, 0.0), (2.0, 1.0)]
    seen = []
    for step, (loss, norm) in enumerate(series):
        skipped = SHORT.limits(state).skips_step(loss, norm)
        state = SHORT.observe(state, Outcome(step, loss, norm, norm, norm, skipped=skipped)).state
        seen.append((state.candidates, state.outside, state.in_a_row))
    assert seen[8:] == [
        ((5.0,), 1, 1),
        ((5.0, 3.0), 1, 0),
        ((5.0, 3.0, 5.0), 2, 1),
        ((5.0, 3.0, 5.0), 2, 0),
        ((), 0, 0),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected", "accepted", "refused"),
    [
        ({"sigmas": 0}, "> 0 and finite", [5e-324], [0.0, math.inf, math.nan]),
        (
            {"tolerance": 0},
            ">= 0 and finite (a heat; 0: drop each outlier)",
            [0.0, 5e-324, 99.0],
            [-5e-324, math.inf, math.nan],
        ),
        ({"min_samples": 0}, "from 2 to window=128", [2, 128], [1, 129]),
        ({"window": 0, "min_samples": 2}, ">= 2", [2], [1]),
        ({"signals": ""}, '"both", "loss" or "grad_norm"', ["both", "loss", "grad_norm"], ["norm"]),
        ({"min_sigma_norm": 0, "log_norm": False}, ">= 0 and finite", [0.0], [-5e-324, math.inf, math.nan]),
        ({"min_sigma_norm": 0}, "> 0 in log space (log_norm=True)", [5e-324], [0.0]),
        ({"min_sigma_loss": 0}, ">= 0 and finite", [0.0], [-5e-324, math.inf, math.nan]),
        ({"regime_after": 0}, ">= 2 or None", [2, None], [1]),
        (
            {"regime_after": 0, "tolerance": 0.0},
            ">= 2 with tolerance=0 and keep_outliers=False: without it, a new level of the norm is dropped for ever",
            [2],
            [None],
        ),
        ({"regime_after": 0, "tolerance": 0.0, "keep_outliers": True}, ">= 2 or None", [2, None], [1]),
        ({"max_in_a_row": 0}, "> regime_after=20", [21], [20]),
        ({"max_in_a_row": 0, "regime_after": None}, "> 0", [1], [0]),
    ],
)
def test_ranges_of_the_arguments(
    arguments: dict[str, Any], expected: str, accepted: list[Any], refused: list[Any]
) -> None:
    """Bug: a range off by one, or a message with another name, range or key."""
    argument = next(iter(arguments))
    given, beyond = ([{**arguments, argument: value} for value in values] for values in (accepted, refused))
    check_range(SkipOutliersRule, "skip_outliers", "plugins.outliers", argument, expected, given, beyond)
