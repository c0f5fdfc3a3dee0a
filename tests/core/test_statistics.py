"""Running statistics, compared with numpy; non-finite numbers never enter them."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletrain.core.statistics import MAD_TO_SIGMA, DelayedWindow, Ema, Window

samples = st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=40)
poisoned = st.lists(
    st.one_of(st.floats(-1e9, 1e9), st.sampled_from([math.nan, math.inf, -math.inf])), min_size=1, max_size=40
)
decays = st.floats(0.01, 0.999)


@given(samples, st.floats(0, 1))
def test_quantile_median_and_mad_are_numpys(values: list[float], q: float) -> None:
    """Bug: an index off by one, the wrong interpolation, or a MAD around the mean."""
    window = Window().extend(values)
    assert window.median == np.median(values)
    assert window.mad == np.median(np.abs(np.array(values) - np.median(values)))
    assert window.quantile(q) == np.quantile(values, q)


@given(samples, st.integers(1, 12))
def test_a_window_keeps_the_last_samples(values: list[float], size: int) -> None:
    """Bug: the sorted half of a window that drops another sample than the ordered half."""
    window = Window()
    for value in values:
        window = window.add(value, size)
        assert len(window) <= size
    assert window.values == tuple(values[-size:])
    assert window.ordered == tuple(sorted(values[-size:]))


def test_a_window_that_shrinks() -> None:
    """Bug: a smaller size on resume that never takes effect."""
    assert Window().extend([3.0, 1.0, 2.0]).add(5.0, size=2).values == (2.0, 5.0)


@given(samples, st.integers(1, 9), st.integers(0, 9))
def test_a_delayed_window_sees_a_sample_later(values: list[float], size: int, delay: int) -> None:
    """Bug: a delay off by one, or samples lost between waiting room and window."""
    window = DelayedWindow()
    for value in values:
        window = window.add(value, size, delay)
    seen = values[: max(0, len(values) - delay)]
    assert window.window.values == tuple(seen[-size:])
    assert window.waiting == tuple(values[len(seen) :])


@given(samples, decays)
def test_the_moving_average_is_its_formula(values: list[float], decay: float) -> None:
    """Bug: the variance around the old mean, or decay on the wrong side."""
    ema, mean, var = Ema(0.0, 1.0), 0.0, 1.0
    for x in values:
        ema = ema.add(x, decay)
        mean = decay * mean + (1 - decay) * x
        var = decay * var + (1 - decay) * (x - mean) ** 2
    assert ema == pytest.approx((mean, var), rel=1e-9)
    assert ema.std == math.sqrt(ema.var)


@given(samples)
def test_moments_are_numpys(values: list[float]) -> None:
    """Bug: the sample variance, or a sum that loses digits."""
    ema = Ema.from_moments(values)
    assert ema.mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert ema.var == pytest.approx(np.var(values), rel=1e-6, abs=1e-3)


@given(samples, st.floats(0, 1e3))
def test_a_robust_start(values: list[float], floor: float) -> None:
    """Bug: a missing factor from MAD to sigma, or a floor on the variance instead of the deviation."""
    ema = Ema.from_robust(values, min_sigma=floor)
    mad = float(np.median(np.abs(np.array(values) - np.median(values))))
    assert ema.mean == np.median(values)
    assert ema.std == pytest.approx(max(floor, MAD_TO_SIGMA * mad), rel=1e-12)


def test_one_outlier_does_not_move_a_robust_start() -> None:
    """Bug: moments where the robust pair was meant."""
    values = [1.0, 1.1, 0.9, 1.05, 0.95]
    assert Ema.from_robust([*values, 1e9]).mean < 1.1
    assert Ema.from_robust([*values, 1e9]).std < 0.3


@given(poisoned, st.integers(1, 9), st.integers(0, 5), decays)
def test_non_finite_samples_leave_no_trace(values: list[float], size: int, delay: int, decay: float) -> None:
    """Bug: one NaN or infinity, at any position, that ruins a statistic for ever."""
    finite = [x for x in values if math.isfinite(x)]

    def run(series: list[float]) -> list[Any]:
        ema, window, delayed = Ema(0.0, 1.0), Window(), DelayedWindow()
        for x in series:
            ema, window, delayed = ema.add(x, decay), window.add(x, size), delayed.add(x, size, delay)
        return [ema, window, delayed, Window().extend(series)]

    assert run(values) == run(finite)
    if finite:
        assert Ema.from_moments(values) == Ema.from_moments(finite)
        assert Ema.from_robust(values) == Ema.from_robust(finite)


def test_statistics_are_values() -> None:
    """Bug: a statistic changed in place, so that a snapshot of it changes too."""
    window = Window().extend([1.0, 2.0])
    window.add(3.0, size=2)
    assert window.values == (1.0, 2.0)
