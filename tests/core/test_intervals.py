"""When a checkpoint is due."""

from typing import Any

import pytest

from stabletrain.core.intervals import SaveTriggers
from stabletrain.core.lengths import RunLength
from stabletrain.errors import UserError

RUN = RunLength(total_steps=1000, steps_per_epoch=100, tokens_per_step=2000)


def due_steps(every: Any, upto: int = 1000) -> list[int]:
    triggers = SaveTriggers(every)
    triggers.start(RUN, step=0, now=0.0)
    return [step for step in range(1, upto + 1) if triggers.due(step, now=0.0)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [(300, [300, 600, 900]), ("250", [250, 500, 750, 1000]), ("3ep", [300, 600, 900]), ("50%", [500, 1000]),
     ("1e6tok", [500, 1000]), ([400, "500"], [400, 500, 800, 1000]), (None, []), ([], [])],
)  # fmt: skip
def test_lengths(every: Any, expected: list[int]) -> None:
    """Bug: a length in another unit, or several lengths of which only one counts."""
    assert due_steps(every) == expected


def test_multiples_stay_after_a_resume() -> None:
    """Bug: after a resume, checkpoints at other steps than before."""
    triggers = SaveTriggers(100)
    triggers.start(RUN, step=130, now=0.0)
    assert [step for step in range(131, 320) if triggers.due(step, 0.0)] == [200, 300]


def test_a_skipped_step_is_not_due_again() -> None:
    """The count of applied steps stands still while steps are skipped: one checkpoint, not one per attempt."""
    triggers = SaveTriggers(2)
    triggers.start(RUN, step=0, now=0.0)
    assert [triggers.due(step, 0.0) for step in (1, 2, 2, 2, 3, 4)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(("every", "seconds"), [("30s", 30), ("10min", 600), ("1.5h", 5400), ("2 d", 172800)])
def test_times(every: str, seconds: float) -> None:
    """Bug: a wrong unit of time, or a time that is not counted from the last save."""
    triggers = SaveTriggers(every)
    triggers.start(RUN, step=0, now=1000.0)
    assert not triggers.due(1, 1000.0 + seconds - 0.1)
    assert triggers.due(2, 1000.0 + seconds)
    triggers.saved(1000.0 + seconds)
    assert not triggers.due(3, 1000.0 + seconds + 1)


@pytest.mark.parametrize("every", [-1, "10 parsecs", "", 1.5, [True], "10m", "nans", "infs", {"ep": 1}, ["1h", "x"]])
def test_values_that_are_no_interval_name_the_key_and_all_forms(every: Any) -> None:
    """Bug: a message that lists lengths only, as if times did not exist; NaN seconds, which are never over."""
    with pytest.raises(UserError, match=r"^plugins\.x\.every: expected 500 .*'10min'.*, got "):
        SaveTriggers(every, "plugins.x.every")


@pytest.mark.parametrize("every", [0, "0s", "0ep", "-5s", [500, "0h"]])
def test_intervals_that_are_not_above_zero_are_refused(every: Any) -> None:
    """Bug: a division by zero at the first step, or a checkpoint at every step."""
    with pytest.raises(UserError, match=r"every: expected an interval above 0, got"):
        SaveTriggers(every)


def test_the_shortest_of_several_times_counts() -> None:
    """Bug: the last time of the list, or the longest, wins."""
    assert SaveTriggers(["2h", "10min", "1d"]).seconds == 600


def test_a_length_that_the_run_cannot_resolve_names_the_missing_quantity() -> None:
    """Bug: an interval in tokens that is never due."""
    with pytest.raises(UserError, match="tokens_per_step"):
        SaveTriggers("1e9tok").start(RunLength(), step=0, now=0.0)
