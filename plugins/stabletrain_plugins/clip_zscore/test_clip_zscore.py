"""ZClip's vectors, its defects, and what the default promises: few healthy steps are clipped, and faults are."""

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from argument_ranges import check_range

import stabletrain
from stabletrain.core.events import Event
from stabletrain.core.limits import Bound
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Rule, replay
from stabletrain.core.state import from_plain, to_plain
from stabletrain.core.statistics import Ema
from stabletrain.errors import UserError
from stabletrain_plugins.clip_zscore import rule as module
from stabletrain_plugins.clip_zscore.rule import ClipZScoreRule, ZScoreState

VECTORS = json.loads((Path(__file__).parents[3] / "tests" / "vectors" / "zclip.json").read_text("utf-8"))
SEQUENCES = {name: [float(norm) for norm in norms] for name, norms in VECTORS["sequences"].items()}
SMOOTH = [case for case in VECTORS["cases"] if "nan" not in case["sequence"] and "inf" not in case["sequence"]]


class Step(NamedTuple):
    clipped_norm: float
    state: ZScoreState
    events: tuple[Event, ...]


def run(rule: ClipZScoreRule, norms: list[float], state: ZScoreState | None = None) -> list[Step]:
    state = rule.init() if state is None else state
    steps = []
    for t, norm in enumerate(norms):
        clipped_norm = rule.limits(state).clip(norm)
        state, events, requests = rule.observe(state, Outcome(t, 2.0, norm, norm, clipped_norm))
        assert requests == ()
        steps.append(Step(clipped_norm, state, events))
    return steps


def clipped(rule: ClipZScoreRule, norms: list[float]) -> list[int]:
    return [t for t, step in enumerate(replay(rule, [(2.0, norm) for norm in norms])) if step.outcome.clipped]


def lognormal(seed: int, sigma: float, n: int = 2000, level: float = 0.8) -> list[float]:
    draw = random.Random(seed)
    return [level * math.exp(sigma * draw.gauss(0.0, 1.0)) for _ in range(n)]


# ---- the preset against the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMOOTH, ids=lambda case: f"{case['config']}-{case['sequence']}")
def test_zclip_matches_the_reference(case):
    rule = ClipZScoreRule.zclip(regime_after=None, **case["params"])
    steps = run(rule, SEQUENCES[case["sequence"]])
    # the reference divides by norm + 1e-6 (1.2e-6 of a norm of 0.8) and by std + 1e-6 (1.4e-5 of a variance)
    assert [step.clipped_norm for step in steps] == pytest.approx(case["post_norm"], rel=2e-6)
    for step, mean, var in zip(steps, case["mean"], case["var"], strict=True):
        assert (step.state.ema is None) == (mean is None)
        if step.state.ema is not None:
            assert step.state.ema.mean == pytest.approx(mean, rel=1e-6)
            assert step.state.ema.var == pytest.approx(var, rel=2e-5)


def test_one_nan_does_not_switch_zclip_off():
    # the reference's mean and variance are NaN from there on, and nothing is clipped any more
    norms = SEQUENCES["nan_once_at_60"]
    (case,) = (c for c in VECTORS["cases"] if c["config"] == "no_max" and c["sequence"] == "nan_once_at_60")
    assert case["mean"][-1] == "nan"
    rule = ClipZScoreRule.zclip(max_grad_norm=None)
    without = run(rule, norms[:60] + norms[61:])
    steps = run(rule, norms)
    assert math.isnan(steps[60].clipped_norm)
    assert steps[:60] + steps[61:] == without
    assert run(rule, [8.0], steps[-1].state)[0].clipped_norm < 1.0


def test_infinite_norms_in_the_first_steps_only_prolong_the_warmup():
    # the reference's mean is infinite from the 25th step on
    norms = SEQUENCES["inf_first_3_fp16_start"]
    (case,) = (c for c in VECTORS["cases"] if c["sequence"] == "inf_first_3_fp16_start")
    assert case["mean"][-1] == "inf"
    rule = ClipZScoreRule.zclip(max_grad_norm=None)
    steps = run(rule, norms)
    assert steps[:3] == [(math.inf, rule.init(), ())] * 3  # not even the gradient is touched: 0 * inf is NaN
    assert steps[3:] == run(rule, norms[3:])


def test_zclip_does_not_lock_in_after_a_level_shift():
    # the reference clips every step from 60 on, for ever; so does the preset when asked to
    norms = SEQUENCES["level_shift_x3_from_60"]
    assert set(range(60, 120)) <= set(clipped(ClipZScoreRule.zclip(max_grad_norm=None, regime_after=None), norms))
    after = [t for t in clipped(ClipZScoreRule.zclip(max_grad_norm=None), norms) if t >= 60]
    assert after[:20] == list(range(60, 80))
    assert len(after) <= 22


def test_an_outlier_in_the_warmup_does_not_spoil_zclip():
    norms = lognormal(0, 0.06, 25)
    spoilt = [*norms[:12], 8.0, *norms[13:]]
    clean, robust = (run(ClipZScoreRule.zclip(), each)[-1].state.ema for each in (norms, spoilt))
    assert robust.mean == pytest.approx(clean.mean, rel=0.02)
    assert robust.var == pytest.approx(clean.var, rel=0.3)  # the reference: 1.41**2 instead of 0.05**2


def test_zclip_keeps_its_fixed_maximum_during_the_warmup_and_out_of_the_history():
    """Bugs: nothing is clipped in the warm-up; clipped norms are learned, so that the mean is at most the maximum."""
    steps = run(ClipZScoreRule.zclip(warmup_steps=4), [2.0, 2.2, 1.8, 2.0, 2.1])
    assert [step.clipped_norm for step in steps] == [1.0] * 5
    assert steps[3].state.ema.mean == 2.0


def test_the_preset_makes_the_callback_too():
    """Bug: the preset of the callback makes a rule, or drops arguments."""
    preset = stabletrain.ClipZScore.zclip(max_grad_norm=None, name="zclip")
    assert isinstance(preset, stabletrain.ClipZScore)
    assert (preset.space, preset.target, preset.max_norm, preset.label) == ("linear", "reciprocal", None, "zclip")


def test_the_preset_has_the_published_defaults() -> None:
    """Bug: a default of the preset that is not the paper's, or an argument that goes nowhere."""
    preset: dict[str, Any] = {"warmup_factor": None, "recurrent": 0.0, "space": "linear", "min_sigma": 1e-6}
    published = ClipZScoreRule(
        2.5, 0.97, 25, target="reciprocal", max_norm=1.0, regime_after=20, learn_from_clipped=True, **preset
    )
    assert ClipZScoreRule.zclip() == published
    other = ClipZScoreRule.zclip(
        alpha=0.9,
        z_thresh=2.0,
        max_grad_norm=None,
        warmup_steps=9,
        clip_factor=0.5,
        skip_update_on_spike=True,
        regime_after=None,
        name="x",
    )
    assert other == ClipZScoreRule(
        2.0,
        0.9,
        9,
        target="reciprocal",
        clip_factor=0.5,
        regime_after=None,
        learn_from_clipped=False,
        name="x",
        **preset,
    )
    assert ClipZScoreRule.zclip(mode="percentile").target == "threshold"
    assert ClipZScoreRule.zclip(mode="percentile", clip_option="mean").target == "threshold"
    assert ClipZScoreRule.zclip(clip_option="mean").target == "mean"


@pytest.mark.parametrize(
    "arguments",
    [{"mode": "percentil"}, {"clip_option": "median"}, {"mode": "mean", "clip_option": "zscore"}],
)
def test_the_preset_refuses_unknown_choices(arguments: dict[str, Any]) -> None:
    """Bug: a misspelt mode taken for the default one."""
    with pytest.raises(UserError) as error:
        ClipZScoreRule.zclip(**arguments)
    mode, option = arguments.get("mode", "zscore"), arguments.get("clip_option", "adaptive_scaling")
    assert str(error.value) == (
        'clip_zscore: zclip() expects mode "zscore" or "percentile", and clip_option "adaptive_scaling" or "mean"; '
        f"got mode={mode!r} and clip_option={option!r} (ClipZScore(mode=...) and ClipZScore(clip_option=...))"
    )


@pytest.mark.parametrize("arguments", [{"clip_option": "mean"}, {"mode": "percentile"}])
def test_the_preset_refuses_a_clip_factor_without_effect(arguments: dict[str, Any]) -> None:
    """Bug: a sweep over clip_factor that compares equal runs."""
    with pytest.raises(UserError) as error:
        ClipZScoreRule.zclip(clip_factor=0.5, **arguments)
    mode, option = arguments.get("mode", "zscore"), arguments.get("clip_option", "adaptive_scaling")
    assert str(error.value) == (
        f"clip_zscore: clip_factor=0.5 has no effect with mode={mode!r} and clip_option={option!r}, only with 'zscore' "
        "and 'adaptive_scaling': set it to 1.0 (ClipZScore(clip_factor=...))"
    )


# ---- the default ----------------------------------------------------------------------------------------------------

HEALTHY = {
    "steady": lambda t, n: (0.8, 0.06),
    "steady_wide": lambda t, n: (0.8, 0.3),
    "exponential_decay": lambda t, n: (5.0 * 0.04 ** (t / n), 0.06),
    "fast_decay": lambda t, n: (0.2 + 5.0 * math.exp(-t / 100), 0.1),
    "slow_drift": lambda t, n: (0.5 * 3.0 ** (t / n), 0.06),
    "slow_wave": lambda t, n: (math.exp(0.5 * math.sin(t / 300)), 0.1),
    "heavy_tail": lambda t, n: (1.0, 1.0),
}


@pytest.mark.parametrize("shape", HEALTHY)
def test_the_default_clips_few_healthy_steps(shape):
    """Bug: a threshold that cuts the gradients of healthy training; the warm-up is meant to clip more."""
    touched = []
    for seed in range(5):
        draw, n = random.Random(seed), 4000
        levels = [HEALTHY[shape](t, n) for t in range(n)]
        norms = [level * math.exp(sigma * draw.gauss(0.0, 1.0)) for level, sigma in levels]
        rule = ClipZScoreRule()
        touched.append(sum(t >= rule.warmup_steps for t in clipped(rule, norms)) / n)
    assert max(touched) <= 0.005


@pytest.mark.parametrize("factor", [1.5, 3.0, 10.0])
@pytest.mark.parametrize("sigma", [0.02, 0.06, 0.1, 0.3])
def test_the_default_adapts_to_a_higher_level(factor, sigma):
    """Bug: every step after a rise is clipped to the old level."""
    for seed in range(5):
        norms = lognormal(seed, sigma)
        norms = norms[:500] + [factor * norm for norm in norms[500:]]
        late = [t for t in clipped(ClipZScoreRule(), norms) if t >= 525]
        assert len(late) <= 0.005 * len(norms)


def test_the_default_guards_a_lower_level_soon_after_a_fall():
    """Bug: after a fall, faults as high as the old level pass."""
    for seed in range(5):
        norms = lognormal(seed, 0.06)
        norms = norms[:500] + [norm / 10 for norm in norms[500:]]
        norms[525] *= 10
        assert 525 in clipped(ClipZScoreRule(), norms)


@pytest.mark.parametrize("sigma", [0.06, 0.1, 0.2, 0.3])
@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_faults_are_clipped(sigma, factor):
    """Bug: one fault raises the threshold so far that the next one passes. Where they recur, the threshold follows."""
    faults = range(100, 2000, 100)
    for seed in range(5):
        norms = lognormal(seed, sigma)
        for t in faults:
            norms[t] *= factor
        first = set(faults[:3])  # after each, the threshold is at most half a nat higher
        assert first <= set(clipped(ClipZScoreRule(), norms))
        assert set(faults) <= set(clipped(ClipZScoreRule(recurrent=0.0), norms))


def test_a_burst_shorter_than_a_regime_is_clipped_to_its_end():
    """Bug: a burst is learned as a new level before ``regime_after`` steps."""
    norms = lognormal(0, 0.06)
    norms[500:515] = [20 * norm for norm in norms[500:515]]
    assert set(range(500, 515)) <= set(clipped(ClipZScoreRule(), norms))


def test_levels_that_alternate_do_not_lock_in():
    # never regime_after in a row: only the history of clipped norms can end it
    norms = lognormal(0, 0.06)
    norms[500::2] = [3 * norm for norm in norms[500::2]]
    assert max(clipped(ClipZScoreRule(), norms)) < 600


@pytest.mark.parametrize("share", [0.11, 0.3])
def test_outliers_that_are_no_exception_are_not_clipped_for_ever(share):
    """Bug: norms that come regularly never enter the statistics."""
    draw = random.Random(0)
    norms = [100 * norm if draw.random() < share else norm for norm in lognormal(0, 0.06, 5000)]
    assert len(clipped(ClipZScoreRule(), norms)) / len(norms) < 1 / 3.0**2


def test_one_tiny_norm_does_not_blind_the_log_statistics():
    # log(1e-30) is 69 below: taken as it is, it would raise the threshold beyond any fault for hundreds of steps
    norms = lognormal(0, 0.06)
    norms[500], norms[501] = 1e-30, 8.0
    assert 501 in clipped(ClipZScoreRule(), norms)


def test_zero_norms_are_no_history():
    """Bug: the logarithm of 0, or a mean that zeros pull down."""
    norms = lognormal(0, 0.06, 200)
    rule = ClipZScoreRule(warmup_steps=10)
    with_zeros = [0.0, *norms[:100], 0.0, *norms[100:]]
    steps = run(rule, with_zeros)
    assert (steps[0].clipped_norm, steps[101].clipped_norm) == (0.0, 0.0)
    assert [s for t, s in enumerate(steps) if t not in (0, 101)][-1].state == run(rule, norms)[-1].state


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, 1e200])
@pytest.mark.parametrize("rule", [ClipZScoreRule(warmup_steps=4), ClipZScoreRule.zclip(warmup_steps=4)], ids=str)
def test_a_bad_norm_at_any_position_leaves_no_trace(bad, rule):
    """Bug: a non-finite, zero or huge norm enters the statistics, in the warm-up or within a run of high norms."""
    norms = [1.0, 1.1, 0.9, 1.0, 1.2, 9.0, 9.0, 1.0, 1.05]
    expected = run(rule, norms)[-1].state
    for position in range(len(norms) + 1):
        assert run(rule, [*norms[:position], bad, *norms[position:]])[-1].state == expected


@pytest.mark.parametrize("change", [{"skipped": True}, {"overflow": True}])
def test_a_step_that_was_not_applied_is_not_learned(change):
    """Bug: norms of skipped steps or overflows enter the statistics."""
    rule = ClipZScoreRule()
    state = run(rule, lognormal(0, 0.06, 60))[-1].state
    assert rule.observe(state, Outcome(60, 2.0, 50.0, 50.0, math.nan, **change)).state == state


def test_the_history_does_not_depend_on_tighter_bounds_of_others():
    """Bug: the joined result is learned instead of this rule's own bound."""
    rule, norms = ClipZScoreRule(), lognormal(0, 0.3, 200)
    state = rule.init()
    for t, norm in enumerate(norms):
        state = rule.observe(state, Outcome(t, 2.0, norm, norm, 0.01)).state
    assert state == run(rule, norms)[-1].state


def test_a_new_regime_is_reported_with_its_numbers():
    """Bug: a new level without an event, or one with a wrong step or value."""
    norms = [1.0, 1.02, 0.98] * 30
    steps = run(ClipZScoreRule(), [*norms, *(5.0 * norm for norm in norms[:30])])
    ((t, event),) = [(t, event) for t, step in enumerate(steps) for event in step.events]
    assert t == event.step == 90 + 19
    assert (event.plugin, event.kind) == ("clip_zscore", "regime")
    assert event.value == pytest.approx(5.0, rel=0.01)
    assert "20 steps in a row" in event.reason
    assert "-> 5" in event.reason


@pytest.mark.parametrize(
    ("target", "expected"), [("threshold", math.exp(0.6)), ("mean", 1.0), ("reciprocal", math.exp(0.36 / 3.0))]
)
@pytest.mark.parametrize("clip_factor", [1.0, 0.5])
def test_targets_in_log_space(target, expected, clip_factor):
    """Bug: a target computed in linear space, or a clip factor that is a difference."""
    rule = ClipZScoreRule(target=target, clip_factor=clip_factor, min_sigma=0.2, warmup_steps=2)
    state = run(rule, [1.0, 1.0])[-1].state
    assert rule.limits(state).clip(math.exp(3.0)) == pytest.approx(clip_factor * expected)
    assert rule.limits(state).clip(math.exp(0.59)) == math.exp(0.59)


@pytest.mark.parametrize("rule", [ClipZScoreRule(), ClipZScoreRule.zclip(), ClipZScoreRule(regime_after=None)], ids=str)
def test_resumed_from_json_at_any_cut_equals_uninterrupted(rule: Rule):
    """Bug: a part of the state is lost in a checkpoint, as the samples of the warm-up or of a new level."""
    norms = lognormal(0, 0.1, 60) + lognormal(1, 0.1, 30, level=4.0)
    whole = run(rule, norms)
    for cut in range(len(norms)):
        plain = json.loads(json.dumps(to_plain(whole[cut].state)))
        resumed = run(rule, norms[cut + 1 :], from_plain(rule.state_type(), plain))
        assert [(s.clipped_norm, s.state) for s in resumed] == [(s.clipped_norm, s.state) for s in whole[cut + 1 :]]


def learned(rule: ClipZScoreRule, norms: list[float]) -> ZScoreState:
    return run(rule, norms)[-1].state


def test_a_quiet_warmup_keeps_norms_within_28_percent_of_its_median() -> None:
    """Bug: without `_OUTLIER_SIGMA` a warm-up of equal norms excludes every norm that differs in the last digits."""
    rule = ClipZScoreRule(warmup_steps=5)
    for last, included in ((1.28, True), (1.29, False), (0.78, True), (0.77, False)):
        ema = learned(rule, [1.0] * 4 + [last]).ema
        logs = [0.0] * 4 + [math.log(last)] * included
        assert tuple(ema) == pytest.approx(tuple(Ema.from_moments(logs)))


def test_a_noisy_warmup_excludes_norms_beyond_5_robust_standard_deviations() -> None:
    """Bug: a factor of MAD or of sigma that is missing, so that outliers enter or healthy norms do not."""
    logs = [-0.2, -0.1, 0.0, 0.1, 0.2]  # MAD 0.1 with the sixth norm: limits at 0.05 + 5 * 1.4826 * 0.15 = 1.16
    rule = ClipZScoreRule(warmup_steps=6)
    for last, included in ((1.15, True), (1.17, False)):
        ema = learned(rule, [math.exp(x) for x in [*logs, last]]).ema
        assert tuple(ema) == pytest.approx(tuple(Ema.from_moments([*logs, last] if included else logs)))


def test_a_lower_level_is_learned_and_reported_in_log_space() -> None:
    """Bugs: the upper limit in an event about a fall; a fall that widens the statistics without a limit."""
    rule = ClipZScoreRule(warmup_steps=2, regime_after=3, min_sigma=0.1, name="mine")
    steps = run(rule, [1.0, 1.0, 0.5, 0.5, 0.5])
    below = -(3.0 * 0.1)
    first = Ema(0.0, 0.0).add(below, 0.98)
    assert steps[2].state == ZScoreState(first, (0.5,), -1)
    second = first.add(first.mean - 3.0 * 0.1, 0.98)
    assert steps[3].state == ZScoreState(second, (0.5, 0.5), -1)
    limit = math.exp(second.mean - 0.3)
    ((event,),) = [step.events for step in steps if step.events]
    text = f"grad_norm below {limit:.4g} for 3 steps in a row: new level learned, {math.exp(second.mean):.4g} -> 0.5"
    assert event == Event(4, "mine", "regime", pytest.approx(0.5), pytest.approx(limit), text)
    assert steps[4].state == ZScoreState(Ema(math.log(0.5), 0.0))


def test_a_higher_level_is_reported_with_the_upper_limit() -> None:
    """Bug: the lower limit, or a mean in log space, in an event about a rise."""
    rule = ClipZScoreRule(warmup_steps=2, regime_after=2, min_sigma=0.1, space="linear")
    steps = run(rule, [1.0, 1.0, 5.0, 5.0])
    mean = 0.98 * 1.0 + 0.02 * 1.3
    limit = mean + 3 * max(0.1 * mean, math.sqrt(0.02 * (1.3 - mean) ** 2))
    ((event,),) = [step.events for step in steps if step.events]
    text = f"grad_norm above {limit:.4g} for 2 steps in a row: new level learned, {mean:.4g} -> 5"
    assert event == Event(3, "clip_zscore", "regime", 5.0, pytest.approx(limit), text)


def test_a_run_ends_on_the_other_side_and_in_the_middle() -> None:
    """Bug: steps above and below the limits counted together as a new level."""
    rule = ClipZScoreRule(warmup_steps=2, regime_after=3, min_sigma=0.1)
    states = [step.state for step in run(rule, [1.0, 1.0, 5.0, 5.0, 0.1, 5.0, 1.0, 5.0])]
    assert [(state.side, state.samples) for state in states[2:]] == [
        (1, (5.0,)),
        (1, (5.0, 5.0)),
        (-1, (0.1,)),
        (1, (5.0,)),
        (0, ()),
        (1, (5.0,)),
    ]


def test_in_linear_space_a_low_norm_enters_the_statistics_as_it_is() -> None:
    """Bug: the lower limit of log space used where the statistics are linear."""
    state = learned(ClipZScoreRule(warmup_steps=2, space="linear", min_sigma=0.01), [1.0, 1.0, 0.1])
    assert state == ZScoreState(Ema(1.0, 0.0).add(0.1, 0.98))


def test_a_norm_at_a_limit_is_within_it() -> None:
    """Bug: >= for >: the norm at the limit, to which steps are clipped, is the first of a new level."""
    rule = ClipZScoreRule(warmup_steps=2, min_sigma=0.1)
    state = learned(rule, [1.0, 1.0])
    (bound,) = rule.limits(state).bounds
    for norm, side in ((bound.threshold, 0), (math.nextafter(bound.threshold, 9.0), 1), (math.exp(-0.2999), 0)):
        assert rule.observe(state, Outcome(2, 2.0, norm, norm, norm)).state.side == side


def test_clipped_steps_may_be_left_out_of_the_statistics_but_not_of_a_new_level() -> None:
    """Bug: with learn_from_clipped=False a new level is clipped for ever; without regime_after the state grows."""
    rule = ClipZScoreRule(warmup_steps=2, regime_after=3, learn_from_clipped=False)
    steps = run(rule, [1.0, 1.0, 5.0, 5.0, 5.0])
    assert steps[3].state == ZScoreState(Ema(0.0, 0.0), (5.0, 5.0), 1, module._RISE * (1 - rule.recurrent))
    assert steps[4].state == ZScoreState(Ema(math.log(5.0), 0.0))
    forever = ClipZScoreRule(warmup_steps=2, recurrent=0.0, regime_after=None, learn_from_clipped=False)
    assert learned(forever, [1.0, 1.0] + [5.0] * 9) == ZScoreState(Ema(0.0, 0.0), (), 1)


def test_the_bounds_are_those_of_the_formulas() -> None:
    """Bugs: a clip factor on the threshold; a pole or a pull where the target has none; a lost fixed maximum."""
    log, linear = Ema(0.5, 0.04), Ema(2.0, 0.25)

    def bounds(ema: Ema, **arguments: Any) -> frozenset[Bound]:
        return ClipZScoreRule(**arguments).limits(ZScoreState(ema)).bounds

    half = math.log(0.5)
    assert bounds(log) == {Bound(0.5 + 3 * 0.2, 0.5 + 3 * 0.2, 0.0, 0.0, True)}
    assert bounds(log, target="mean", clip_factor=0.5) == {Bound(0.5 + 3 * 0.2, 0.5 + half, 0.0, 0.0, True)}
    (bound,) = bounds(log, target="reciprocal", clip_factor=0.5)
    assert tuple(bound) == pytest.approx((1.1, 0.5 + half, 0.36, 0.5, True))
    (bound,) = bounds(linear, space="linear", target="reciprocal", clip_factor=0.5, z_threshold=2.0)
    assert bound == Bound(3.0, 1.0, 0.5, 2.0, False)
    assert bounds(linear, space="linear", target="mean") == {Bound(3.5, 2.0, 0.0, 0.0, False)}
    assert Bound(7.0, 7.0) in bounds(log, max_norm=7.0)
    assert ClipZScoreRule(max_norm=7.0).limits(ZScoreState()).bounds == {Bound(7.0, 7.0)}
    assert ClipZScoreRule().limits(ZScoreState()).bounds == frozenset()


def test_the_largest_norm_that_is_learned() -> None:
    """Bug: a norm whose square is infinite makes the variance infinite for ever."""
    for norm, known in ((9.9e149, 1), (1e150, 0)):
        assert len(ClipZScoreRule().observe(ZScoreState(), Outcome(0, 2.0, norm, norm, norm)).state.samples) == known


@pytest.mark.parametrize(
    ("argument", "expected", "accepted", "refused"),
    [
        ("z_threshold", "> 0 and finite", [5e-324], [0.0, math.inf, math.nan]),
        ("decay", "in (0, 1)", [5e-324, math.nextafter(1, 0)], [0.0, 1.0, math.nan]),
        ("warmup_steps", ">= 2", [2], [1]),
        ("warmup_factor", "> 1 and finite, or None", [math.nextafter(1, 2), None], [1.0, math.inf, math.nan]),
        ("recurrent", "in [0, 1)", [0.0, math.nextafter(1, 0)], [-5e-324, 1.0, math.nan]),
        ("space", '"log" or "linear"', ["log", "linear"], ["Log"]),
        (
            "target",
            '"threshold", "mean" or "reciprocal"',
            ["threshold", "mean", "reciprocal"],
            ["median"],
        ),
        ("clip_factor", "> 0 and finite", [5e-324], [0.0, math.inf, math.nan]),
        ("max_norm", "> 0 or None", [5e-324, None], [0.0, math.nan]),
        ("regime_after", ">= 2 or None", [2, None], [1]),
        ("min_sigma", "> 0 and finite", [5e-324], [0.0, math.inf, math.nan]),
    ],
)
def test_ranges_of_the_arguments(argument: str, expected: str, accepted: list[Any], refused: list[Any]) -> None:
    """Bug: a range off by one, or a message with another name, range or key."""
    given, beyond = ([{argument: value} for value in values] for values in (accepted, refused))
    check_range(ClipZScoreRule, "clip_zscore", "plugins.clip", argument, expected, given, beyond)
