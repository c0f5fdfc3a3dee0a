"""The comparison of two records of steps."""

import math

import numpy as np
import pytest

from stabletrain.runtime.records.steps_file import Flag, Steps
from stabletrain.tracking.same_run import compare_steps, describe

RECORDED = Flag.RECORDED.value


def steps(losses, norms=None, flags=None, numbers=None) -> Steps:
    count = len(losses)
    return Steps(
        np.arange(count) if numbers is None else np.array(numbers, dtype=np.int64),
        np.array(losses, dtype=np.float64),
        np.array(norms if norms is not None else [1.0] * count, dtype=np.float64),
        np.array(flags if flags is not None else [RECORDED] * count, dtype=np.uint8),
    )


BASE = [2.0, 1.5, 1.25, 1.0]


def test_equal_records_are_identical_with_what_is_not_finite_at_every_place():
    """Bugs: NaN differs from itself, or from a NaN with other bits; inf minus inf counts as a difference."""
    assert describe(compare_steps(steps(BASE), steps(BASE))) == ["bit-identical over 4 steps"]
    nothing = [math.nan] * 4
    said = describe(compare_steps(steps(BASE, norms=nothing), steps(BASE, norms=nothing)))
    assert said == ["bit-identical over 4 steps (losses only: no gradient norm was recorded)"]
    other_nan = np.array([0xFFF8000000000001], dtype=np.uint64).view(np.float64)[0]
    for place in range(4):
        for value in (math.nan, math.inf, -math.inf):
            same = [*BASE[:place], value, *BASE[place + 1 :]]
            again = [*BASE[:place], other_nan if value != value else value, *BASE[place + 1 :]]
            assert compare_steps(steps(same), steps(again)).verdict == "identical"
            assert compare_steps(steps(BASE, norms=same), steps(BASE, norms=again)).verdict == "identical"
            for a, b in ((same, BASE), (BASE, same)):
                found = compare_steps(steps(a), steps(b))
                assert (found.verdict, found.first, found.beyond) == ("differs", place, place)
                assert found.largest == math.inf


@pytest.mark.parametrize("place", range(4))
def test_one_bit_is_a_difference_and_its_place_is_named(place):
    """Bugs: values are compared with a tolerance only; the last bit, or the sign of a zero, is lost; the first
    differing step or the part that differs is another."""
    bit = [math.nextafter(x, 9) if i == place else x for i, x in enumerate(BASE)]
    found = compare_steps(steps(BASE), steps(bit))
    assert (found.verdict, found.first, found.beyond, found.parts) == ("close", place, None, ("loss",))
    lines = describe(found)
    assert lines[0] == "within 1e-5 over 4 steps, not bit-identical"
    assert f"loss at step {place}: {BASE[place]!r} -> {bit[place]!r}" in lines
    assert "forward pass" in found.where
    norms = compare_steps(steps(BASE), steps(BASE, norms=[2.0 if i == place else 1.0 for i in range(4)]))
    assert (norms.verdict, norms.parts) == ("close", ("grad_norm",))
    assert "backward" in norms.where
    flags = [RECORDED | (Flag.CLIPPED.value if i == place else 0) for i in range(4)]
    decided = compare_steps(steps(BASE), steps(BASE, flags=flags))
    assert (decided.verdict, decided.first, decided.parts) == ("differs", place, ("flags",))
    assert f"flags at step {place}: applied as it is -> clipped" in describe(decided)
    assert compare_steps(steps([0.0]), steps([-0.0])).verdict == "close"


def test_first_within_the_tolerance_then_beyond():
    """Bugs: a run that drifts is called different from its first bit on; the step is off by one."""
    drifting = [2.0, 1.5 * (1 + 1e-7), 1.25 * (1 + 1e-6), 1.1]
    found = compare_steps(steps(BASE), steps(drifting))
    assert (found.first, found.beyond, found.verdict) == (1, 3, "close")
    lines = describe(found)
    assert lines[0] == "within 1e-5 up to step 2, then not"
    assert "the first different bits are at step 1" in lines
    assert describe(compare_steps(steps(BASE), steps([2.0, 1.6, 1.0, 1.0])))[0] == "differs from step 1 on"


def test_steps_that_one_of_them_lacks_are_never_equal():
    """Bugs: a hole counts as equal; a repeat that ended early, or went on, is called identical; nothing in common is
    identical over 0 steps."""
    short = compare_steps(steps(BASE), steps(BASE[:2]))
    assert (short.verdict, short.missing, short.extra) == ("incomplete", 2, 0)
    longer = compare_steps(steps(BASE[:2]), steps(BASE))
    assert (longer.verdict, longer.missing, longer.extra) == ("incomplete", 0, 2)
    hole = compare_steps(steps([2.0, 1.0], numbers=[0, 3]), steps(BASE))
    assert (hole.verdict, hole.compared, hole.unrecorded) == ("identical", 2, 2)
    assert describe(hole)[-1] == "2 steps of which the original has no record: unknown"
    nothing = compare_steps(steps([]), steps(BASE))
    assert nothing.verdict == "unknown"
    assert describe(nothing)[0].startswith("unknown")
    part = compare_steps(steps(BASE), steps(BASE[:3]), begin=1, end=3)
    assert (part.verdict, part.compared) == ("identical", 2)
