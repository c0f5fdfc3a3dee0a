"""Bounds and conditions: joining is a set union, clipping never raises a norm or changes a non-finite one."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletrain.core.limits import NO_LIMITS, Bound, Limits, SkipAbove, SkipBelow, SkipNonFinite, join

numbers = st.floats(-50, 50)
norms = st.one_of(st.floats(0, 1e12), st.sampled_from([0.0, 1.0, 1e-30, 1e300, math.inf, math.nan]))
signals = st.one_of(st.floats(-1e6, 1e6), st.sampled_from([math.inf, -math.inf, math.nan]))


@st.composite
def bounds(draw: st.DrawFn) -> Bound:
    above = draw(numbers)
    centre = above - draw(st.floats(1e-3, 10))
    return Bound(above, draw(numbers), draw(st.floats(0, 100)), centre, draw(st.booleans()))


skips = st.one_of(
    st.just(SkipNonFinite()),
    st.builds(SkipAbove, st.sampled_from(["loss", "grad_norm"]), st.floats(-1e6, 1e6)),
    st.builds(SkipBelow, st.floats(-1e6, 1e6)),
)
limits = st.builds(
    lambda parts, fallback: Limits.of(*parts)._replace(fallback=frozenset(fallback)),
    st.lists(st.one_of(bounds(), skips), max_size=4),
    st.lists(bounds(), max_size=2),
)


@given(limits, limits, limits)
def test_joining_is_a_set_union(a: Limits, b: Limits, c: Limits) -> None:
    """Bug: a result that depends on the order or on the repetition of plugins."""
    assert a | b == b | a
    assert (a | b) | c == a | (b | c)
    assert a | a == a
    assert a | NO_LIMITS == a == NO_LIMITS | a
    assert join([]) == NO_LIMITS
    assert {join(order) for order in itertools.permutations([a, b, c])} == {a | b | c}


@given(limits, norms)
def test_clipping_never_raises_a_norm_or_changes_a_non_finite_one(some: Limits, norm: float) -> None:
    """Bug: a bound that amplifies a gradient, or makes a number of NaN or infinity."""
    clipped = some.clip(norm)
    if math.isfinite(norm):
        assert 0 <= clipped <= norm
    else:
        assert repr(clipped) == repr(norm)


@given(limits, limits, norms.filter(math.isfinite))
def test_the_joined_limits_clip_to_the_minimum(a: Limits, b: Limits, norm: float) -> None:
    """Bug: bounds applied one after the other, the second to the result of the first."""
    both = a.bounds | b.bounds or a.fallback | b.fallback
    assert (a | b).clip(norm) == min((bound.clip(norm) for bound in both), default=norm)


@given(st.lists(bounds(), max_size=3), st.lists(bounds(), max_size=3), norms)
def test_a_fallback_applies_only_where_no_rule_gives_a_bound(
    given_bounds: list[Bound], fallback: list[Bound], norm: float
) -> None:
    """Bugs: a fallback that tightens the clipper's bound; or is lost if another rule, with conditions only, joins."""
    clipper, careful = Limits.of(*given_bounds), Limits(fallback=frozenset(fallback))
    conditions = Limits.of(SkipNonFinite(), SkipAbove("loss", 1.0))
    applied = clipper if given_bounds else Limits.of(*fallback)
    for order in itertools.permutations([clipper, careful, conditions]):
        assert repr(join(order).clip(norm)) == repr(applied.clip(norm))


@given(limits, limits, signals, signals)
def test_any_condition_drops_the_step(a: Limits, b: Limits, loss: float, grad_norm: float) -> None:
    """Bug: one plugin's condition that hides another's."""
    assert (a | b).skips_step(loss, grad_norm) == (a.skips_step(loss, grad_norm) or b.skips_step(loss, grad_norm))


@pytest.mark.parametrize("log", [False, True])
def test_a_norm_at_the_threshold_is_untouched(log: bool) -> None:
    """Bug: >= for >, by which a steady norm would be rescaled for ever."""
    bound = Bound(above=0.5, target=0.1, log=log)
    assert bound.clip(bound.threshold) == bound.threshold
    above = math.nextafter(bound.threshold, math.inf)
    assert bound.clip(above) < bound.threshold


@pytest.mark.parametrize("log", [False, True])
def test_a_degenerate_pole_does_not_divide_by_zero(log: bool) -> None:
    """Bug: a history without variance has its pole at the threshold; log() may round a norm above it back onto it."""
    bound = Bound(above=0.3, target=0.3, pull=1e-40, centre=0.3, log=log)
    norm = bound.threshold
    for _ in range(8):
        norm = math.nextafter(norm, math.inf)
        assert 0 < bound.clip(norm) <= norm


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_signals(bad: float) -> None:
    """Bug: NaN that passes every comparison, or infinity that counts as an ordinary outlier."""
    assert SkipNonFinite().hits(bad, 1.0)
    assert SkipNonFinite().hits(1.0, bad)
    assert not SkipNonFinite().hits(1.0, 1.0)
    assert not SkipAbove("loss", 0.0).hits(bad, 1.0)
    assert not SkipAbove("grad_norm", 0.0).hits(1.0, bad)
    assert not SkipBelow(1.0).hits(bad, 0.0)
    assert not SkipBelow(-math.inf).hits(-1.7e308, 0.0)


def test_a_signal_at_the_limit_does_not_drop_the_step() -> None:
    """Bug: >= for >, by which a constant signal without a spread is dropped for ever."""
    assert not SkipAbove("loss", 2.0).hits(2.0, 9.0)
    assert SkipAbove("loss", 2.0).hits(math.nextafter(2.0, 3.0), 0.0)
    assert not SkipAbove("grad_norm", 2.0).hits(9.0, 2.0)
    assert not SkipBelow(-2.0).hits(-2.0, -9.0)
    assert SkipBelow(-2.0).hits(math.nextafter(-2.0, -3.0), 0.0)


def test_reciprocal_pull_matches_its_formula() -> None:
    """Bug: the z-score's reciprocal clip, mean + (z * std)**2 / (norm - mean), with a wrong pole or weight."""
    mean, z, std, norm = 2.0, 2.5, 0.4, 9.0
    bound = Bound(above=mean + z * std, target=mean, pull=(z * std) ** 2, centre=mean)
    assert bound.clip(norm) == pytest.approx(mean + (z * std) ** 2 / (norm - mean), rel=1e-15)
    assert bound.clip(bound.threshold + 1e-9) == pytest.approx(bound.threshold)
