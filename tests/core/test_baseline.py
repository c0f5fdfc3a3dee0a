"""Baselines and the outlier test: exact limits, the midpoint, new levels, and signals without a spread."""

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletrain.core.baseline import Baseline, OutlierTest

LOSS = OutlierTest(z_threshold=6.0, window=64, delay=8, min_samples=16, min_sigma=0.02, log=False)
NORM = LOSS._replace(min_sigma=0.05, log=True)


def learned(test, values):
    baseline = Baseline()
    for value in values:
        baseline = test.learn(baseline, value)
    return baseline


def normal(n=200, centre=2.0, sigma=0.1):
    draw = random.Random(0)
    return [centre + sigma * draw.gauss(0, 1) for _ in range(n)]


def test_nothing_is_judged_before_the_window_has_enough_delayed_values():
    """Bug: limits from too few values, or from values that are not old enough."""
    values = normal(24)
    assert learned(LOSS, values[:23]).limit is None
    assert learned(LOSS, values).limit is not None
    assert not LOSS.is_outlier(learned(LOSS, values[:23]), 1e9)


def test_the_limit_lies_z_robust_sigmas_above_the_median():
    """Bug: a factor of MAD or of z that is missing."""
    baseline = learned(LOSS._replace(window=256), normal(2000))
    assert 2.0 + 5.8 * 0.1 < LOSS.limit(baseline) < 2.0 + 7.5 * 0.1
    assert NORM.limit(learned(NORM, [math.exp(x) for x in normal()])) == pytest.approx(math.exp(2.6), rel=0.2)


def test_a_signal_without_noise_has_the_floor_as_its_scale():
    """Bug: a scale of 0, so that every change is an outlier."""
    assert LOSS.limit(learned(LOSS, [2.0] * 50)) == pytest.approx(2.0 * 1.12)
    assert NORM.limit(learned(NORM, [2.0] * 50)) == pytest.approx(2.0 * math.exp(0.3))


def test_zeros_have_no_scale():
    """Bug: a limit of 0 from a loss of zeros, above which every step is an outlier."""
    assert learned(LOSS, [0.0] * 50).limit is None
    assert learned(NORM, [0.0] * 50) == Baseline()


def test_a_negative_loss_is_judged_upwards_too():
    """Bug: a floor relative to a negative median puts the limit below it."""
    baseline = learned(LOSS, [x - 5.0 for x in normal()])
    assert LOSS.is_outlier(baseline, 0.0)
    assert not LOSS.is_outlier(baseline, -3.0)
    assert not LOSS.is_outlier(baseline, -90.0)


def test_a_log_normal_loss_has_the_limit_of_its_logarithm():
    """Bug: a limit in linear space flags the long tail of a healthy loss."""
    draw = random.Random(1)
    values = [0.1 * math.exp(0.6 * draw.gauss(0, 1)) for _ in range(2000)]
    baseline = learned(LOSS._replace(window=512), values)
    assert LOSS.limit(baseline) > max(values)
    assert LOSS.is_outlier(baseline, 20.0)


def test_a_loss_with_a_long_tail_has_a_limit_beyond_it():
    # catches healthy steps dropped from runs whose batches hold 1 to 64 samples: the MAD reflects the usual size only
    draw = random.Random(2)
    sizes = [max(1, min(64, round(8 * math.exp(draw.gauss(0, 1))))) for _ in range(4000)]
    values = [2.5 + 0.3 / math.sqrt(size) * draw.gauss(0, 1) for size in sizes]
    test, baseline = LOSS._replace(window=128, delay=0, min_samples=64), Baseline()
    above = 0
    for value in values:
        above += test.is_outlier(baseline, value)
        baseline = test.learn(baseline, value)
    assert above <= 1, "it was 5 without the tail"
    assert test.limit(baseline) < 4.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_learned(value):
    """Bug: a non-finite value enters the window."""
    baseline = learned(LOSS, normal())
    assert LOSS.learn(baseline, value) == baseline
    norms = learned(NORM, normal())
    assert NORM.learn(norms, value) == norms


def test_a_new_level_has_at_least_the_old_spread_until_it_has_enough_values():
    """Bug: the spread of a few values of a new level makes ordinary steps outliers."""
    old = learned(NORM, [math.exp(x) for x in normal(sigma=0.3)])
    new = NORM.relearn(old, [20.0] * 5)
    assert NORM.centre(new) == pytest.approx(20.0)
    assert new.limit - new.centre == pytest.approx(old.limit - old.centre)
    for _ in range(8 + 16):
        new = NORM.learn(new, 20.0)
    assert new.least_sigma == 0.0
    assert new.limit - new.centre == pytest.approx(0.3)


def test_the_largest_numbers_break_nothing():
    """Bug: a difference or sum of large values becomes infinite."""
    baseline = learned(NORM, [1e300, 1e-300] * 40)
    assert math.isfinite(NORM.limit(baseline))
    assert learned(LOSS, [1e308, -1e308] * 40).limit is None
    assert LOSS.limit(learned(LOSS, [1e308, 1.0, 1e-308] * 30)) > 0


def expected_limit(test: OutlierTest, accepted: list[float]) -> float | None:
    """The limits of the docstring, with the standard library's median and standard deviation."""
    values = accepted[-test.window :]
    if len(values) < test.min_samples:
        return None
    ordered = sorted(values)
    if not test.robust:
        centre = statistics.fmean(values)
        spread = max(statistics.stdev(values) if ordered[0] < ordered[-1] else 0.0, test.min_sigma * abs(centre))
        return centre + test.z_threshold * spread
    centre = statistics.median(values)
    mad = statistics.median(abs(value - centre) for value in values)
    windows = (accepted[max(0, n - test.window) : n] for n in range(test.min_samples, len(accepted) + 1))
    centres = [statistics.median(window) for window in windows]
    floor = max(test.min_sigma * abs(centre), 0.001 * (max(centres) - min(centres)))
    spread = max(1.482602218505602 * mad, test.min_sigma if test.log else floor)
    limits = [centre + test.z_threshold * spread]
    if not test.log:
        if spread == 0:
            return None
        quartile, tail = (ordered[math.ceil(q * (len(values) - 1))] for q in (0.75, 0.98))
        limits.append(centre + test.z_threshold * (tail - centre) / 1.7)
        if centre > 0:
            limits.append(centre * (quartile / centre) ** (1.482602218505602 * test.z_threshold))
    return max(limits)


@given(
    st.lists(st.floats(0.5, 8.0), min_size=1, max_size=40),
    st.sampled_from([1.0, 3.0, 6.0]),
    st.integers(2, 20),
    st.integers(0, 5),
    st.sampled_from([0.0001, 0.01, 0.3]),
    st.sampled_from([(True, True), (False, True), (False, False)]),
)
def test_the_limit_is_the_highest_of_its_formulas(
    values: list[float], z: float, window: int, delay: int, floor: float, space: tuple[bool, bool]
) -> None:
    """Bugs: a wrong quantile, factor or floor; a delay or a window off by one; log and linear mixed up."""
    log, robust = space
    test = OutlierTest(z, window, delay, max(2, window // 2), floor, log, robust)
    baseline = learned(test, values)
    accepted = [math.log(value) if log else value for value in values[: max(0, len(values) - delay)]]
    expected, past = expected_limit(test, accepted), accepted[-window:]
    assert (baseline.limit is None) == (expected is None)
    if baseline.limit is not None:
        assert baseline.limit == pytest.approx(expected, rel=1e-9)
        centre = statistics.median(past) if robust else statistics.fmean(past)
        assert test.centre(baseline) == pytest.approx(math.exp(centre) if log else centre)
        assert test.limit(baseline) == pytest.approx(math.exp(baseline.limit) if log else baseline.limit)


def test_raised_begins_at_the_midpoint_and_an_outlier_beyond_the_limit() -> None:
    """Bug: `is_raised` at another share of the way than half; a value at the limit taken for an outlier."""
    baseline = Baseline(centre=2.0, limit=3.0)
    assert [LOSS.is_raised(baseline, value) for value in (2.5, math.nextafter(2.5, 3.0))] == [False, True]
    assert [LOSS.is_outlier(baseline, value) for value in (3.0, math.nextafter(3.0, 4.0))] == [False, True]
    assert [NORM.is_raised(baseline, math.exp(s)) for s in (2.49, 2.51)] == [False, True]
    assert [NORM.is_outlier(baseline, math.exp(s)) for s in (2.99, 3.01)] == [False, True]
    for test, value in itertools.product((LOSS, NORM), (0.0, -1.0, 1e300)):
        assert not test.is_raised(Baseline(), value)
        assert not test.is_outlier(Baseline(), value)
        assert test.limit(Baseline()) == math.inf
    assert not NORM.is_raised(baseline, 0.0)


def test_a_second_new_level_keeps_the_spread_of_the_first() -> None:
    """Bug: `relearn` that forgets `least_sigma`: after two level shifts the limit lies at the floor, and healthy steps
    are outliers."""
    old = learned(NORM, [math.exp(x) for x in normal(sigma=0.3)])
    once = NORM.relearn(old, [20.0] * 5)
    twice = NORM.relearn(once, [400.0] * 5)
    assert twice.least_sigma == once.least_sigma > 0.2
    assert twice.limit - twice.centre == pytest.approx(old.limit - old.centre)


def test_a_new_level_is_that_of_the_last_learnable_values() -> None:
    """Bugs: zeros or old values in a new level; the delay applied to a new level."""
    old = learned(NORM, [1.0] * 40)
    new = NORM.relearn(old, [5.0] * 9 + [0.0, -1.0] + [0.5] * 64)
    assert new.past.window.values == (math.log(0.5),) * 64
    assert new.past.waiting == ()
    assert NORM.limit(new) == pytest.approx(0.5 * math.exp(0.3))
    loss = LOSS.relearn(learned(LOSS, [2.0] * 40), [-1.0, 0.0, 1.0, 0.5])
    assert loss.past.window.values == (-1.0, 0.0, 1.0, 0.5)


def test_a_delayed_value_changes_nothing_but_the_waiting_list() -> None:
    """Bug: a new level that loses its limit or its spread with the next step."""
    new = NORM.relearn(learned(NORM, [math.exp(x) for x in normal(sigma=0.3)]), [20.0] * 5)
    after = NORM.learn(new, 21.0)
    assert after == new._replace(past=new.past._replace(waiting=(math.log(21.0),)))


def test_equal_values_have_no_spread_but_the_floor() -> None:
    """Bug: the rounding error of a mean taken for a spread: 0.1 is then an outlier among values of 0.1."""
    test = OutlierTest(6.0, 8, 0, 2, 0.0, log=False, robust=False)
    baseline = learned(test, [0.1] * 7)
    assert (baseline.centre, baseline.limit) == (0.1, 0.1)
    assert learned(test, [0.0] * 7).limit is None
    robust = learned(test._replace(robust=True), [0.1] * 7)
    assert robust == baseline._replace(limit=None, covered=(0.1, 0.1))


def test_values_near_the_largest_float_give_no_limit() -> None:
    """Bug: an infinite limit in a checkpoint, or a centre that is compared with it."""
    baseline = learned(OutlierTest(6.0, 4, 0, 2, 0.02, log=False), [1.7e308] * 3)
    assert (baseline.centre, baseline.limit) == (0.0, None)


# ---- the range of the run, accepted levels, and sizes ----------------------------------------------------------------

PLAIN = OutlierTest(6.0, 32, 0, 16, 0.02, log=False)


def test_near_zero_the_spread_is_at_least_a_thousandth_of_the_covered_range() -> None:
    """Bug: a loss that fell from 2 to 1e-9 judged by the spread of its rounding errors."""
    fallen = learned(PLAIN, [2.0] * 40 + [1e-9] * 40)
    assert fallen.covered == (1e-9, 2.0)
    assert PLAIN.limit(fallen) == pytest.approx(6 * 0.002, rel=1e-3)
    assert learned(PLAIN, [2.0] * 40 + [0.0] * 40).limit == pytest.approx(6 * 0.002)
    for other in (PLAIN._replace(log=True), PLAIN._replace(robust=False)):
        assert learned(other, [2.0] * 40 + [1e-9] * 40).covered is None


@pytest.mark.parametrize("wild", [1e300, -1e300, 1.7e308, math.nan, math.inf])
def test_a_few_wild_values_do_not_widen_the_covered_range(wild: float) -> None:
    """Bug: one value of 1e300, in the warm-up or later, after which nothing is an outlier."""
    values = normal(100)
    for at in (0, 10, 50):
        baseline = learned(PLAIN, [*values[:at], *[wild] * 3, *values[at:]])
        assert baseline.limit is not None
        assert baseline.limit < 3.5
        assert baseline.covered is not None
        assert baseline.covered[1] - baseline.covered[0] < 0.5


def test_an_overflow_does_not_enter_the_covered_range() -> None:
    """Bug: a range of infinity, or one that is lost."""
    high = learned(PLAIN, [*normal(40), *[1.7e308] * 40])
    assert high.limit is None
    assert high.covered is not None
    assert high.covered[1] < 3.0
    again = learned_from(PLAIN, high, normal(40))
    assert again.limit == pytest.approx(learned(PLAIN, normal(40)).limit, rel=0.01)


def learned_from(test: OutlierTest, baseline: Baseline, values: list[float]) -> Baseline:
    for value in values:
        baseline = test.learn(baseline, value)
    return baseline


@pytest.mark.parametrize("test", [PLAIN, PLAIN._replace(log=True), PLAIN._replace(robust=False)])
def test_up_to_the_limit_of_an_accepted_level_nothing_is_an_outlier_again(test: OutlierTest) -> None:
    """Bugs: the ceiling lost at the next value, at a lower level, while there are too few values, or at an overflow; a
    later, lower level that lowers it; non-finite values accepted."""
    low = learned(test, normal(40))
    high = test.accept(low, [*(4.0 * value for value in normal(20)), math.nan, math.inf])
    assert high.ceiling == high.limit
    assert test.limit(high) > 8.0
    back = learned_from(test, high, normal(100))
    assert (back.limit, back.ceiling) == (high.ceiling, high.ceiling)
    assert test.centre(back) == pytest.approx(2.0, rel=0.05)
    few = test.relearn(back, normal(3))
    assert (few.ceiling, few.limit) == (high.ceiling, high.ceiling)
    assert test.accept(back, normal(20)).ceiling == high.ceiling
    assert test.accept(back, [math.nan, math.inf]) == back == test.accept(back, [])
    assert test.accept(back, [100.0] * 20).ceiling > high.ceiling


@pytest.mark.parametrize("test", [PLAIN, PLAIN._replace(log=True), PLAIN._replace(robust=False)])
def test_a_level_accepted_by_an_empty_baseline_has_no_limit_yet(test: OutlierTest) -> None:
    """Bug: an IndexError, where a level is accepted before anything was learned."""
    new = test.accept(Baseline(), normal(3))
    assert (len(new.past.window), new.limit, new.ceiling) == (3, None, None)
    assert learned_from(test, new, normal(13)).limit is not None


def test_values_below_the_least_size_have_no_limit() -> None:
    """Bugs: rounding noise about zero judged by its own spread; the least size compared with the centre alone, which is
    near zero for a policy gradient's loss of any size."""
    baseline = learned(PLAIN, [1e-9 * (x - 2.0) for x in normal(40)])
    assert baseline.size == pytest.approx(1e-10, rel=0.5)
    assert PLAIN.limit(baseline) < 1e-8
    assert PLAIN.limit(baseline, 1e-5) == math.inf
    assert PLAIN.limit(learned(PLAIN, [x - 2.0 for x in normal(40)]), 0.05) < 1.0
    assert PLAIN.limit(learned(PLAIN, [2.0] * 40), 1.9) < PLAIN.limit(learned(PLAIN, [2.0] * 40), 2.1) == math.inf


def test_the_rounding_size_comes_from_the_norm_where_its_level_is_known() -> None:
    """Bug: the logarithm of an unknown norm, 0, taken for a norm of 1."""
    assert NORM.rounding_size(Baseline()) == 0.0
    assert NORM.rounding_size(learned(NORM, [50.0] * 60)) == pytest.approx(5e-4)


def test_the_share_of_raised_values() -> None:
    """Bugs: values above the limit counted instead of raised ones; a division by zero before there is a limit."""
    assert PLAIN.share_raised(Baseline()) == 0.0
    assert PLAIN.share_raised(learned(PLAIN, [2.0] * 15)) == 0.0
    log = PLAIN._replace(min_sigma=0.05, log=True)  # the limit is exp(0.3), the midpoint exp(0.15) = 1.16
    assert log.share_raised(learned(log, [1.0] * 25 + [1.1] * 2 + [1.2] * 4 + [2.0])) == 5 / 16
    assert log.share_raised(learned(log, [2.0] * 8 + [1.0] * 24)) == 0.0, "a signal that falls"


def test_a_few_values_of_a_new_level_do_not_widen_the_covered_range() -> None:
    """Bug: three norms of a spike, learned as a level, widen the spread's floor for the rest of the run."""
    old = learned(PLAIN, normal(40))
    new = PLAIN.relearn(old, [500.0] * 3)
    assert new.covered == old.covered
    assert learned_from(PLAIN, new, normal(12)).covered == old.covered
    assert learned_from(PLAIN, new, normal(40)).limit < 4.0


def test_what_is_known_of_the_run_outlives_a_level_without_a_limit() -> None:
    """Bug: a level of equal values, which has no spread to hand on, forgets the accepted level and the range."""
    test = PLAIN._replace(min_sigma=0.0, robust=False)
    high = test.accept(learned(test, normal(40)), [9.0, 9.5, 10.0] * 7)
    constant = learned_from(test, high, [10.0] * 40)._replace(covered=(1.0, 2.0))
    few = test.relearn(constant, [2.0] * 3)
    assert (few.limit, few.ceiling, few.covered) == (None, high.ceiling, (1.0, 2.0))
    assert test.limit(learned_from(test, few, normal(40))) == high.ceiling
