"""Positions in a run: every form, and what is no position."""

import pytest

from stabletrain.core.lengths import RunLength
from stabletrain.core.positions import parse, resolve
from stabletrain.errors import UserError


@pytest.mark.parametrize(
    ("total", "given", "steps"),
    [
        (None, [600, "600.0ep", "3ep"], [600, 60000, 300]),
        (1000, ["10%", "999"], [100, 999]),
        (1000, [], []),
        (1, [], []),
    ],
)
def test_positions_in_steps(total: int | None, given: list[int | str], steps: list[int]) -> None:
    """Bugs: a form resolved in another one's unit; the last position that still comes refused."""
    run = RunLength(total_steps=total, steps_per_epoch=100)
    assert list(resolve(parse(given, name="key"), run, name="key")) == steps


@pytest.mark.parametrize(
    ("given", "got"),
    [([1000], "1000"), ([1001], "1001"), (["10ep"], "'10ep', step 1000"), (["100%"], "'100%', step 1000")],
)
def test_a_position_after_the_last_step_never_comes(given: list[int | str], got: str) -> None:
    """Bug: a position equal to the run's length taken for one that comes: there is no step after it."""
    with pytest.raises(UserError) as error:
        resolve(parse(given, name="key"), RunLength(total_steps=1000, steps_per_epoch=100), name="key")
    assert str(error.value) == (
        f"key: expected positions before the end of the run, after 1000 steps, got {got}, which never comes: remove "
        "it, or train longer"
    )
