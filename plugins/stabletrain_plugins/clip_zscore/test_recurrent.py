"""The warm-up's limit, and the threshold that follows single norms that recur."""

import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from stabletrain.core.limits import Bound
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import replay
from stabletrain.core.state import from_plain, to_plain
from stabletrain_plugins.clip_zscore import rule as module
from stabletrain_plugins.clip_zscore.rule import ClipZScoreRule, ZScoreState

DEFAULT, NEVER_RAISED = ClipZScoreRule(), ClipZScoreRule(recurrent=0.0)
FALL = module._RISE * DEFAULT.recurrent


def applied(rule: ClipZScoreRule, norms: Sequence[float], state: ZScoreState | None = None) -> list[float]:
    return [step.outcome.applied_norm for step in replay(rule, [(2.0, norm) for norm in norms], state)]


def after(rule: ClipZScoreRule, norms: Sequence[float], state: ZScoreState | None = None) -> ZScoreState:
    state = rule.init() if state is None else state
    for t, norm in enumerate(norms):
        state = rule.observe(state, Outcome(t, 2.0, norm, norm, norm)).state
    return state


def threshold(rule: ClipZScoreRule, state: ZScoreState) -> float:
    return min(bound.threshold for bound in rule.limits(state).bounds)


def lognormal(seed: int, n: int, sigma: float = 0.1) -> list[float]:
    r = random.Random(seed)
    return [math.exp(sigma * r.gauss(0, 1)) for _ in range(n)]


# ---- the warm-up -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["log", "linear"])
def test_the_warmup_has_a_limit_from_the_sixth_norm_on(space: Any) -> None:
    """Bugs: a gradient 1,000 times too long at step 20 goes through; a limit from too few norms."""
    rule = ClipZScoreRule(space=space)
    norms = lognormal(0, 40)
    for at in range(40):
        faulty = [1000.0 if t == at else norm for t, norm in enumerate(norms)]
        clipped = applied(rule, faulty)
        limit = rule.warmup_factor * sorted(faulty[at - 5 : at])[1] if at >= 5 else 1000.0
        assert clipped[at] == limit
        assert [c for t, c in enumerate(clipped) if t != at] == [norm for t, norm in enumerate(norms) if t != at]
        assert threshold(rule, after(rule, faulty)) < 6.0


def test_the_limit_of_the_warmup_follows_a_falling_norm_and_is_not_raised_by_every_other_norm() -> None:
    """Bugs: the large norms of the first steps as the limit; early instability that raises its own limit."""
    rule = ClipZScoreRule()
    falling = [10.0 * 0.9**t for t in range(40)]
    assert applied(rule, falling) == falling
    assert applied(rule, [*falling, 1.0])[-1] == 2.0 * falling[-2]
    unstable = [1.0, 30.0] * 20
    assert max(applied(rule, unstable)[5:]) == 2.0


def test_the_warmup_counts_learnable_norms_and_may_have_no_limit() -> None:
    """Bugs: zeros and NaN counted as norms, so that the median is of two; `None` that limits after all."""
    assert DEFAULT.limits(after(DEFAULT, [1.0, 0.0, math.nan, 1.0, math.inf, 0.0, 1.0, 1.0])).bounds == frozenset()
    factor = DEFAULT.warmup_factor or math.nan
    assert DEFAULT.limits(after(DEFAULT, [1.0] * 5)).bounds == {Bound(factor, factor)}
    assert DEFAULT.limits(after(DEFAULT, [1e149] * 5)).clip(1e300) == factor * 1e149
    assert ClipZScoreRule(warmup_factor=None).limits(after(DEFAULT, [1.0] * 20)).bounds == frozenset()
    assert ClipZScoreRule.zclip(max_grad_norm=None).limits(after(DEFAULT, [1.0] * 20)).bounds == frozenset()


# ---- single norms that recur -----------------------------------------------------------------------------------------

DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "log-normal": lambda r: math.exp(0.3 * r.gauss(0, 1)),
    "one in 200 is 100 times as long": lambda r: math.exp(0.1 * r.gauss(0, 1)) * (100 if r.random() < 0.005 else 1),
    "Pareto": lambda r: r.paretovariate(2.0),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_in_the_long_run_about_the_recurrent_share_is_clipped(name: str) -> None:
    """Bugs: a threshold that only rises, or falls as fast as it rises."""
    r = random.Random(0)
    norms = [DISTRIBUTIONS[name](r) for _ in range(30_000)]
    clipped = [a < g for a, g in zip(applied(DEFAULT, norms), norms, strict=True)]
    # each rise ends at the norm itself, so that more steps than `recurrent` are clipped, by less
    assert DEFAULT.recurrent / 4 < sum(clipped[10_000:]) / 20_000 < 2.5 * DEFAULT.recurrent


def test_what_recurs_is_applied_at_its_length() -> None:
    """Bug: the gradients of a rare class held to the norm of the common ones for ever, so that it is never learned."""
    norms = lognormal(0, 4000)
    rare = range(200, 4000, 200)
    for t in rare:
        norms[t] *= 100
    follows, cut = applied(DEFAULT, norms), applied(NEVER_RAISED, norms)
    assert all(follows[t] < norms[t] / 30 for t in rare[:3])  # a single fault is clipped
    assert all(follows[t] > 0.5 * norms[t] for t in rare[-3:])
    assert all(cut[t] < norms[t] / 30 for t in rare)


@pytest.mark.parametrize("factor", [10.0, 100.0])
def test_faults_that_recur_are_followed_too(factor: float) -> None:
    """Documents a limit: a fault every 100 steps cannot be told from a rare class, and is clipped ever less."""
    norms = lognormal(1, 3000)
    faults = range(100, 3000, 100)
    for t in faults:
        norms[t] *= factor
    ratios = [applied(DEFAULT, norms)[t] / norms[t] for t in faults]
    assert ratios[0] < 2.0 / factor
    assert ratios[-1] > 0.5


def test_one_high_norm_raises_the_threshold_by_half_a_nat_and_it_falls_again() -> None:
    """Bugs: a rise of another size, or one that stays; mean and variance learned from the raised threshold."""
    warm = after(DEFAULT, [1.0] * 60)
    base = threshold(DEFAULT, warm)
    state = after(DEFAULT, [50.0], warm)
    assert state.raised == module._RISE
    assert state.ema == after(NEVER_RAISED, [50.0], warm).ema
    assert state.ema is not None
    assert threshold(DEFAULT, state) == pytest.approx(base * math.exp(module._RISE), rel=0.01)
    later = after(DEFAULT, [1.0] * 100, state)
    assert later.raised == pytest.approx(module._RISE - 100 * FALL)
    assert after(DEFAULT, [1.0] * 600, state).raised == 0.0
    assert after(DEFAULT, [1.0, 50.0], state).raised == pytest.approx(2 * module._RISE - FALL)


def test_the_threshold_is_never_raised_above_the_norm() -> None:
    """Bug: norms just above the threshold raise it by half a nat each, and soon nothing is clipped."""
    state = after(DEFAULT, [1.0] * 60)
    r = random.Random(2)
    for _ in range(300):
        norm = threshold(DEFAULT, state) * (1.0 + 10.0 ** -r.uniform(1, 16))
        new = after(DEFAULT, [norm], state)
        assert new.ema is not None
        assert state.ema is not None
        bound = math.exp(state.ema.mean + DEFAULT._margin(state.ema) + new.raised)
        assert bound <= max(norm, threshold(DEFAULT, state)) * (1 + 1e-12)
        assert new.raised >= state.raised - FALL
        state = after(DEFAULT, [1.0], new)


def test_a_burst_raises_the_threshold_once() -> None:
    """Bug: each step of a burst raises the threshold, and the later ones pass."""
    warm = after(DEFAULT, [1.0] * 60)
    state = after(DEFAULT, [50.0] * 10, warm)
    assert state.raised == pytest.approx(module._RISE - 9 * FALL)
    # a norm within the raised threshold, but above the other, is no single one either
    between = 0.5 * (threshold(DEFAULT, state._replace(raised=0.0)) + threshold(DEFAULT, state))
    assert after(DEFAULT, [1.0, between, 50.0], state).raised == pytest.approx(state.raised - 3 * FALL)


@pytest.mark.parametrize(
    "rule", [ClipZScoreRule(space="linear"), NEVER_RAISED, ClipZScoreRule.zclip(max_grad_norm=None)], ids=str
)
def test_elsewhere_the_threshold_is_never_raised(rule: ClipZScoreRule) -> None:
    """Bug: the preset differs from the published rule; nats added to a linear threshold."""
    norms = [50.0 if t % 20 == 19 and t > 60 else norm for t, norm in enumerate(lognormal(3, 400))]
    assert after(rule, norms).raised == 0.0


@pytest.mark.parametrize("target", ["threshold", "mean", "reciprocal"])
def test_every_target_is_raised_with_the_threshold(target: Any) -> None:
    """Bug: a rare class that is above the raised threshold held to the mean of the common ones."""
    rule = ClipZScoreRule(target=target)
    state = after(rule, [1.0] * 60)
    raised = state._replace(raised=1.0)
    high = 1e4
    ratio = rule.limits(raised).clip(high) / rule.limits(state).clip(high)
    assert ratio == pytest.approx(math.e)
    edge = threshold(rule, raised)
    assert rule.limits(raised).clip(edge) == edge
    assert rule.limits(raised).clip(1.001 * edge) < edge * 1.001


# ---- states ----------------------------------------------------------------------------------------------------------


def test_a_new_level_starts_without_a_rise() -> None:
    """Bug: a rise of the old level that hides faults of the new one."""
    state = after(DEFAULT, [1.0] * 60)._replace(raised=2.0)
    assert after(DEFAULT, [100.0] * 20, state).raised == 0.0


def test_an_accepted_level_is_learned_if_it_is_higher() -> None:
    """Bug: while steps were dropped this rule learned nothing, and clips the accepted level to the old one; or it
    learns a lower norm from a few steps; or zeros and NaN crash it."""
    state = after(DEFAULT, [1.0] * 60)._replace(raised=0.3)
    higher = DEFAULT.accept_level(state, [2.0] * 20, [4.0] * 19 + [0.0, math.nan, 1e200])
    assert higher.ema is not None
    assert (higher.ema.mean, higher.raised) == (pytest.approx(math.log(4.0)), 0.0)
    for norms in ([0.5] * 20, [0.0] * 20, []):
        assert DEFAULT.accept_level(state, [2.0] * 20, norms) == state
    early = after(DEFAULT, [1.0] * 10)
    assert DEFAULT.accept_level(early, [2.0], [4.0]) == early


def test_resumed_at_any_cut_with_a_raised_threshold() -> None:
    """Bug: the rise, or the norms of the warm-up, lost in a checkpoint."""
    norms = [40.0 if t % 13 == 12 else norm for t, norm in enumerate(lognormal(4, 140))]
    whole, state = applied(DEFAULT, norms), DEFAULT.init()
    assert after(DEFAULT, norms).raised > 1.0
    for cut, norm in enumerate(norms):
        plain = json.loads(json.dumps(to_plain(state), allow_nan=False))
        assert applied(DEFAULT, norms[cut:], from_plain(ZScoreState, plain)) == whole[cut:]
        state = after(DEFAULT, [norm], state)
