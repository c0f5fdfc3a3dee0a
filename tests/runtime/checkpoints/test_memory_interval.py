"""How far apart copies in memory are, so that they cost 2 % of the steps' time."""

import itertools

import pytest

from stabletrain.runtime.checkpoints.memory.interval import SHARE, Interval


def due(interval: Interval, steps: range) -> list[int]:
    return [step for step in steps if interval.due(step)]


def test_a_given_interval_counts_applied_steps() -> None:
    """Bugs: a dropped step, which leaves the count as it was, makes a second copy; a resumed run copies at once."""
    interval = Interval(5, 10)
    assert not interval.due(10)
    assert due(interval, range(11, 21)) == [15, 20]
    assert not interval.due(20)


@pytest.mark.parametrize("slower", [0.0, 0.02])
def test_the_automatic_interval_keeps_to_its_share(slower: float) -> None:
    """Bugs: the slower steps while a copy is written are not counted; a single long wait counts for ever; copies so
    close that one waits for the other."""
    step, wait, lasts = 0.1, 0.3, 20
    interval, seconds, copies, left = Interval("auto", 0), 0.0, [], 0
    for number in range(1, 3001):
        took = step + (slower if left else 0.0)
        interval.took(took, left > 0)
        seconds, left = seconds + took, max(0, left - 1)
        if interval.due(number):
            copies.append(number)
            interval.saved(number, interval.wish(wait))
            left = lasts
    cost = wait + slower * lasts
    expected = cost / (SHARE * step)
    assert copies[0] == 10
    assert all(b - a > lasts for a, b in itertools.pairwise(copies))
    assert copies[-1] - copies[-2] == pytest.approx(expected, rel=0.05)
