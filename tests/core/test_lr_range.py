import itertools
import math
import random

import pytest

from stabletrain.core.lr_range import FEWEST_STEPS, RangeEnd, RangePoint, Rising, read_range


def curve(turn: float = 0.03, noise: float = 0.0, seed: int = 0, steps: int = 200) -> list[RangePoint]:
    """A loss that falls from 4 around 1e-3, is lowest near ``turn``, and then grows."""
    draw, rising = random.Random(seed), Rising(1e-6, 10.0, steps)
    points = []
    for step in range(steps):
        rate = rising.factor(step)
        loss = 4.0 - 2.0 / (1.0 + (1e-3 / rate) ** 1.5) + (rate / turn) ** 1.5 / 10
        points.append(RangePoint(rate, loss + noise * draw.gauss(0, 1)))
    return points


@pytest.mark.parametrize("seed", range(5))
def test_one_noisy_step_decides_nothing(seed: int) -> None:
    """Bug: the steepest of all steps is one that happened to be noisy, decades away from the descent."""
    exact, noisy = read_range(curve()), read_range(curve(noise=0.05, seed=seed))
    assert exact.steepest == pytest.approx(1e-3, rel=0.5)
    assert noisy.steepest is not None
    assert exact.turning is not None
    assert noisy.turning is not None
    assert abs(math.log10(noisy.steepest / exact.steepest)) < 0.5
    assert abs(math.log10(noisy.turning / exact.turning)) < 0.5
    assert noisy.below_turning == pytest.approx(noisy.turning / 10)


def test_what_was_not_seen_is_not_guessed() -> None:
    """Bugs: a rate is suggested by a flat, noisy or rising curve, or a minimum at the highest rate; NaN poisons it."""
    flat = [RangePoint(rate, 3.0 + 0.1 * random.Random(i).gauss(0, 1)) for i, (rate, _) in enumerate(curve())]
    rising = [RangePoint(rate, 1.0 + i) for i, (rate, _) in enumerate(curve())]
    assert read_range(flat).turning is None
    for points in (rising, [], curve()[:3], [RangePoint(1.0, math.nan)] * 50):
        assert read_range(points).steepest is None
    falling = read_range([point for point in curve() if point.rate < 5e-3])
    assert falling.steepest is not None
    assert falling.turning is None
    for value in (math.nan, math.inf, -math.inf):
        for place in (0, 57, 199):
            points = curve()
            points[place] = RangePoint(points[place].rate, value)
            assert read_range(points).turning == pytest.approx(read_range(curve()).turning, rel=0.2)
    cut = [point for point in curve() if point.rate < 5e-3]
    diverged = read_range([*cut, *[RangePoint(5e-3, math.nan)] * 5])
    assert diverged.turning is not None, "a loss that becomes NaN has turned"


def test_it_ends_at_four_times_the_best() -> None:
    """Bugs: it never ends; it ends by noise near a loss of 0, by negative losses, or by one NaN."""
    ended = [RangeEnd(100) for _ in range(5)]
    losses = [10.0] * 20 + [1.0] * 60
    assert not any(ended[0].add(loss) for loss in losses + [3.5] * 50)
    assert not any(ended[1].add(loss) for loss in losses)
    assert any(ended[1].add(100.0) for _ in range(20))
    near_zero = [5.0 * math.exp(-step) + 1e-6 * (step % 7) for step in range(200)]
    assert not any(ended[2].add(loss) for loss in near_zero)
    assert not any(ended[3].add(loss) for loss in [-1.0, math.nan, -2.0, -1.5, math.inf] * 30)
    spiky = RangeEnd(60)
    assert not any(spiky.add(100.0 if step % 4 == 3 else 1.0) for step in range(60))
    assert [ended[4].add(math.nan) for _ in range(5)] == [False] * 4 + [True]


def test_the_rate_rises_by_the_same_factor() -> None:
    """Bug: the last step does not have the highest rate."""
    rates = [Rising(1e-6, 1.0, FEWEST_STEPS).factor(step) for step in range(FEWEST_STEPS)]
    assert rates[0] == pytest.approx(1e-6, rel=1e-12)
    assert rates[-1] == 1.0
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([ratios[0]] * len(ratios))
