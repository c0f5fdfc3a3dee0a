"""The yardstick of the outlier rules: what has no scale is not judged, and what is new is judged with care."""

import math
import random

import pytest

from stabletrain.core.baseline import Baseline, OutlierTest

LOSS = OutlierTest(z_threshold=6.0, window=64, delay=8, min_samples=16, min_sigma=0.02, log=False)
NORM = LOSS._replace(min_sigma=0.05, log=True)


def learned(gauge, values):
    baseline = Baseline()
    for value in values:
        baseline = gauge.learn(baseline, value)
    return baseline


def normal(n=200, centre=2.0, sigma=0.1):
    draw = random.Random(0)
    return [centre + sigma * draw.gauss(0, 1) for _ in range(n)]


def test_nothing_is_judged_before_the_window_has_enough_delayed_values():
    values = normal(24)
    assert learned(LOSS, values[:23]).limit is None
    assert learned(LOSS, values).limit is not None
    assert not LOSS.is_outlier(learned(LOSS, values[:23]), 1e9)


def test_the_limit_lies_z_robust_sigmas_above_the_median():
    baseline = learned(LOSS._replace(window=256), normal(2000))
    assert 2.0 + 5.8 * 0.1 < LOSS.limit(baseline) < 2.0 + 7.5 * 0.1
    assert NORM.limit(learned(NORM, [math.exp(x) for x in normal()])) == pytest.approx(math.exp(2.6), rel=0.2)


def test_a_signal_without_noise_has_the_floor_as_its_scale():
    assert LOSS.limit(learned(LOSS, [2.0] * 50)) == pytest.approx(2.0 * 1.12)
    assert NORM.limit(learned(NORM, [2.0] * 50)) == pytest.approx(2.0 * math.exp(0.3))


def test_zeros_have_no_scale():
    assert learned(LOSS, [0.0] * 50).limit is None
    assert learned(NORM, [0.0] * 50) == Baseline()


def test_a_negative_loss_is_judged_upwards_too():
    baseline = learned(LOSS, [x - 5.0 for x in normal()])
    assert LOSS.is_outlier(baseline, 0.0)
    assert not LOSS.is_outlier(baseline, -3.0)
    assert not LOSS.is_outlier(baseline, -90.0)


def test_a_log_normal_loss_has_the_limit_of_its_logarithm():
    draw = random.Random(1)
    values = [0.1 * math.exp(0.6 * draw.gauss(0, 1)) for _ in range(2000)]
    baseline = learned(LOSS._replace(window=512), values)
    assert LOSS.limit(baseline) > max(values)
    assert LOSS.is_outlier(baseline, 20.0)


def test_a_loss_with_a_long_tail_has_a_limit_beyond_it():
    # catches healthy steps dropped from runs whose batches hold 1 to 64 samples: MAD knows the usual size alone
    draw = random.Random(2)
    sizes = [max(1, min(64, round(8 * math.exp(draw.gauss(0, 1))))) for _ in range(4000)]
    values = [2.5 + 0.3 / math.sqrt(size) * draw.gauss(0, 1) for size in sizes]
    gauge, baseline = LOSS._replace(window=128, delay=0, min_samples=64), Baseline()
    above = 0
    for value in values:
        above += gauge.is_outlier(baseline, value)
        baseline = gauge.learn(baseline, value)
    assert above <= 1, "it was 5 without the tail"
    assert gauge.limit(baseline) < 4.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_learned(value):
    baseline = learned(LOSS, normal())
    assert LOSS.learn(baseline, value) == baseline
    norms = learned(NORM, normal())
    assert NORM.learn(norms, value) == norms


def test_a_level_learned_anew_keeps_the_old_spread_until_it_has_values_of_its_own():
    old = learned(NORM, [math.exp(x) for x in normal(sigma=0.3)])
    new = NORM.relearn(old, [20.0] * 5)
    assert NORM.centre(new) == pytest.approx(20.0)
    assert new.limit - new.centre == pytest.approx(old.limit - old.centre)
    for _ in range(8 + 16):
        new = NORM.learn(new, 20.0)
    assert new.least_sigma == 0.0
    assert new.limit - new.centre == pytest.approx(0.3)


def test_the_largest_numbers_break_nothing():
    baseline = learned(NORM, [1e300, 1e-300] * 40)
    assert math.isfinite(NORM.limit(baseline))
    assert learned(LOSS, [1e308, -1e308] * 40).limit is None
    assert LOSS.limit(learned(LOSS, [1e308, 1.0, 1e-308] * 30)) > 0
