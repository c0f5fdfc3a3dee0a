"""The check whether the loss has fallen when a tenth of the run is over."""

import json
import math
import random
from collections.abc import Sequence

import pytest

from stabletrain.core.learning import Learning, NotLearning
from stabletrain.core.slow_rise import SlowRise
from stabletrain.core.state import from_plain, to_plain


def run(losses: Sequence[float], total: int | None = 1000, cut: int | None = None) -> dict[int, NotLearning]:
    """The findings by the number of losses after which they were made; ``cut``: with a checkpoint after as many."""
    rise, state, found = SlowRise(), Learning().within(total), {}
    for step, loss in enumerate(losses, 1):
        rise, _ = rise.add(loss, step)
        state, finding = state.add(rise)
        if finding is not None:
            found[step] = finding
        if step == cut:
            state = from_plain(Learning, json.loads(json.dumps(to_plain(state))))
    return found


def noisy(level: float, sigma: float, steps: int = 300) -> list[float]:
    draw = random.Random(0)
    return [level + sigma * draw.gauss(0, 1) for _ in range(steps)]


def test_a_loss_that_does_not_fall_is_found_once_after_a_tenth_of_the_run() -> None:
    """Bugs: found late, early or at every step after; wrong numbers."""
    assert run([2.3] * 300) == {100: NotLearning(100, *[pytest.approx(2.3)] * 3, pytest.approx(0.0))}
    ((steps, finding),) = run(noisy(2.3, 0.1)).items()
    assert steps == 100
    assert finding.first == pytest.approx(2.3, abs=0.15)
    assert finding.noise == pytest.approx(0.1, rel=0.3)
    assert finding.limit == finding.first - min(0.02 * finding.first, 3 * finding.noise)
    assert list(run(noisy(2.3, 0.1), total=3000)) == [300]


@pytest.mark.parametrize("share", [0.019, 0.021])
def test_two_per_cent_are_a_fall(share: float) -> None:
    """Bug: another share; the lowest mean ignored, so that a loss that fell and rose again has not fallen."""
    losses = [2.0] * 5 + [2.0 * (1 - share)] * 55 + [2.1 + 0.1 * (-1) ** i for i in range(40)]
    assert bool(run(losses)) == (share < 0.02)


def test_three_standard_deviations_are_a_fall() -> None:
    """Bug: a loss with a large constant part, such as a penalty, is never seen to fall."""
    for fall, found in ((0.02, True), (0.06, False)):
        losses = [100.0] * 5 + [100.0 - fall + 0.01 * (-1) ** i for i in range(95)]
        assert bool(run(losses)) == found


def test_runs_that_learn_are_not_found() -> None:
    """Bug: a report for a loss that falls slowly, at once, or from a negative value."""
    slow = [2.0 * math.exp(-i / 2000) * (1 + 0.01 * (-1) ** i) for i in range(100)]
    at_once = [2.0, 1.8, 1.5, 1.2, 1.1] + [1.0] * 95
    negative = [-1.0 - i / 100 + 0.05 * (-1) ** i for i in range(100)]
    for losses in (slow, at_once, negative):
        assert run(losses) == {}


def test_a_negative_loss_is_compared_with_its_noise() -> None:
    """Bug: a negative share, so that every negative loss has fallen."""
    assert list(run(noisy(-3.0, 0.1))) == [100]


def test_a_loss_about_zero_is_not_judged() -> None:
    """Bug: policy gradients, whose loss need not fall, are reported."""
    assert run(noisy(0.0, 0.1)) == {}
    assert run(noisy(0.0, 1e-10)) == {}


def test_short_runs_and_runs_of_unknown_length_are_not_judged() -> None:
    """Bugs: ten steps judged; an endless run judged; a tenth shorter than a mean."""
    for total in (None, 0, 99):
        assert run([2.0] * 300, total) == {}
    assert list(run([2.0] * 300, 100)) == [20]
    assert list(run([2.0] * 300, 250)) == [25]


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 99, 100, 101])
def test_resumed_is_as_uninterrupted(cut: int) -> None:
    """Bug: the first value, or that the check is made, is not in the checkpoint."""
    losses = noisy(2.0, 0.1)
    assert run(losses, cut=cut) == run(losses)
