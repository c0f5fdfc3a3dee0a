"""Thinned curves keep what matters; smoothed ones follow the level."""

import itertools

import numpy as np
import pytest

from stabletrain.tracking.thinning import Curve, smooth, thin


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_extreme_is_lost(bad):
    """Bugs: the one spike or the first NaN of a long run falls between two kept points; values that are not finite hide
    the extremes of their bucket, at whatever place they are; points are out of order or there twice."""
    rng = np.random.default_rng(3)
    for place in (0, 1, 4999, 9998, 9999):
        value = rng.normal(size=10_000)
        value[(place + 3) % 10_000], value[(place + 50) % 10_000] = 1e9, -1e9
        value[place] = bad
        step = np.arange(10_000) * 3
        kept = thin(Curve(step, value), buckets=100)
        assert len(kept.step) <= 500
        assert np.all(np.diff(kept.step) > 0)
        assert {0, step[-1], step[place]} <= set(kept.step.tolist())
        assert {1e9, -1e9} <= set(kept.value.tolist())
        edges = np.arange(101) * 10_000 // 100
        for low, high in itertools.pairwise(edges):
            inside = value[low:high][np.isfinite(value[low:high])]
            of_bucket = kept.value[np.isin(kept.step, step[low:high])]
            finite = of_bucket[np.isfinite(of_bucket)]
            assert (finite.min(), finite.max()) == (inside.min(), inside.max())


def test_small_and_strange_curves():
    """Bug: an empty curve, one of few points or one of NaN only is an error, or loses points."""
    for values in ([], [1.0], [np.nan] * 3, list(range(40))):
        curve = Curve(np.arange(len(values)), np.array(values, dtype=float))
        assert np.array_equal(thin(curve, buckets=10).value, curve.value, equal_nan=True)
        assert len(smooth(curve).step) == np.isfinite(curve.value).sum()
    nothing = thin(Curve(np.arange(1000), np.full(1000, np.nan)), buckets=10)
    assert nothing.step[[0, -1]].tolist() == [0, 999]


def test_a_smoothed_curve_follows_the_level():
    """Bug: one outlier or a NaN bends the line, a change of level comes late, or the line ends before the run does."""
    value = np.where(np.arange(10_000) < 5000, 4.0, 1.0)
    value[[10, 2000]] = 1e6, np.nan
    line = smooth(Curve(np.arange(10_000), value))
    assert len(line.step) == 200
    assert line.step[[0, -1]].tolist() == [0, 9999]
    assert np.all(
        np.abs(
            line.value[np.abs(line.step - 5000) > 150]
            - np.where(line.step < 5000, 4, 1)[np.abs(line.step - 5000) > 150]
        )
        == 0
    )
