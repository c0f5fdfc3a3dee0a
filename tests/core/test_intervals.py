"""When a checkpoint is due."""

from typing import Any

import pytest

from stabletrain.core.intervals import SaveTriggers
from stabletrain.core.lengths import RunLength
from stabletrain.errors import UserError

RUN = RunLength(total_steps=1000, steps_per_epoch=100, tokens_per_step=2000)


def due_steps(every: Any, upto: int = 1000) -> list[int]:
    intervals = SaveTriggers(every)
    intervals.start(RUN, step=0, now=0.0)
    return [step for step in range(1, upto + 1) if intervals.due(step, now=0.0)]


@pytest.mark.parametrize(
    ("every", "expected"),
    [(300, [300, 600, 900]), ("250", [250, 500, 750, 1000]), ("3ep", [300, 600, 900]), ("50%", [500, 1000]),
     ("1e6tok", [500, 1000]), ([400, "500"], [400, 500, 800, 1000]), (None, []), ([], [])],
)  # fmt: skip
def test_lengths(every: Any, expected: list[int]) -> None:
    assert due_steps(every) == expected


def test_multiples_stay_after_a_resume() -> None:
    intervals = SaveTriggers(100)
    intervals.start(RUN, step=130, now=0.0)
    assert [step for step in range(131, 320) if intervals.due(step, 0.0)] == [200, 300]


def test_a_skipped_step_is_not_due_again() -> None:
    """The count of applied steps stands still while steps are skipped: one checkpoint, not one per attempt."""
    intervals = SaveTriggers(2)
    intervals.start(RUN, step=0, now=0.0)
    assert [intervals.due(step, 0.0) for step in (1, 2, 2, 2, 3, 4)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(("every", "seconds"), [("30s", 30), ("10min", 600), ("1.5h", 5400), ("2 d", 172800)])
def test_times(every: str, seconds: float) -> None:
    intervals = SaveTriggers(every)
    intervals.start(RUN, step=0, now=1000.0)
    assert not intervals.due(1, 1000.0 + seconds - 0.1)
    assert intervals.due(2, 1000.0 + seconds)
    intervals.saved(1000.0 + seconds)
    assert not intervals.due(3, 1000.0 + seconds + 1)


@pytest.mark.parametrize("every", ["0s", 0, "0ep", -1, "10 parsecs", "", 1.5, [True], "10m", "nans"])
def test_nonsense_is_refused(every: Any) -> None:
    with pytest.raises((UserError, TypeError), match=r"every|iterable"):
        SaveTriggers(every)


def test_the_message_says_that_times_exist() -> None:
    with pytest.raises(UserError, match="10min"):
        SaveTriggers("10m", "save_checkpoints.every")


def test_an_unknown_length_of_the_run_is_said() -> None:
    with pytest.raises(UserError, match="tokens_per_step"):
        SaveTriggers("1e9tok").start(RunLength(), step=0, now=0.0)
