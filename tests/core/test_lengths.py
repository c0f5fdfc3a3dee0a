import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabletrain.core.lengths import Length, RunLength, Unit
from stabletrain.errors import UserError

RUN = RunLength(total_steps=1000, steps_per_epoch=250, tokens_per_step=4096)
UNITS: list[Unit] = ["epochs", "tokens", "percent"]
amounts = st.one_of(
    st.integers(0, 10**18), st.floats(0, 1e18, allow_nan=False).map(lambda x: int(x) if x == int(x) else x)
)


@pytest.mark.parametrize(
    ("written", "steps"),
    [
        (500, 500),
        (500.0, 500),
        ("500", 500),
        ("1e3", 1000),
        ("10_000", 10000),
        (0, 0),
        ("3ep", 750),
        ("0.5ep", 125),
        ("1e6tok", 244),
        ("2%", 20),
        ("100 %", 1000),
        (" 3 ep ", 750),
        ("0%", 0),
    ],
)
def test_each_form_means_what_it_says(written: int | float | str, steps: int) -> None:
    """Bug: a form that is refused, or a wrong unit."""
    assert Length.parse(written).resolve(RUN) == steps


@given(st.builds(Length, amounts, st.sampled_from(UNITS)) | st.builds(Length, st.integers(0, 10**18)))
def test_text_reads_back_as_the_same_length(length: Length) -> None:
    # a run.yaml that is written and read again must not change the schedule
    assert Length.parse(str(length)) == length
    assert Length.parse(length) is length


@given(amounts, st.integers(1, 10**7))
def test_a_share_is_never_more_than_half_a_step_off_and_never_vanishes(percent: float, total: int) -> None:
    """Bug: a warm-up of 1 % that is 0 steps in a short run; rounding down."""
    steps = Length(percent, "percent").resolve(RunLength(total_steps=total))
    if percent:
        assert steps >= 1
    if percent <= 100:
        assert steps <= total
        assert abs(steps - percent * total / 100) <= 0.5 + 1e-6 * total or steps == 1


def test_rounds_from_the_decimal_digits_not_from_the_binary_fraction() -> None:
    # 0.29 * 100 is 28.999999999999996 in binary: flooring it would give 28
    assert Length.parse("0.29%").resolve(RunLength(total_steps=10000)) == 29
    assert Length.parse("2.5%").resolve(RunLength(total_steps=100)) == 3  # halves go up, never to even
    assert Length.parse("0.5%").resolve(RunLength(total_steps=100)) == 1


@pytest.mark.parametrize(
    "written", ["", "ep", "three", "10ba", "2 %%", "1e9 tokens", "nan", "inf", "inf%", "nanep", -1, "-3ep", 2.5, "1.5"]
)
def test_what_is_not_a_length_is_refused_with_the_forms_and_the_key(written: int | float | str) -> None:
    """Bug: a fraction of a step, a negative or non-finite length is accepted."""
    with pytest.raises(UserError, match=r"^schedule.lr_warmup: .*(2%)") as error:
        Length.parse(written, name="schedule.lr_warmup")
    assert f"got {written!r}" in str(error.value)


@pytest.mark.parametrize("written", [None, True, [3], {"ep": 3}])
def test_other_types_are_refused(written: object) -> None:
    # True is an int in Python: a warm-up of `true` would silently be one step
    with pytest.raises(UserError, match=r"schedule\.total: expected 500"):
        Length.parse(written, name="schedule.total")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("written", "missing", "way_out"),
    [
        ("2%", "total_steps", "trainer.max_steps"),
        ("3ep", "steps_per_epoch", "in steps"),
        ("1e9tok", "tokens_per_step", "set tokens_per_step"),
    ],
)
def test_an_unknown_quantity_is_named_with_the_way_out(written: str, missing: str, way_out: str) -> None:
    """Bug: a message that does not say which setting is missing."""
    with pytest.raises(UserError, match=f"total: {written} cannot be turned into steps without {missing}") as error:
        Length.parse(written).resolve(RunLength(), name="total")
    assert way_out in str(error.value)


def test_a_senseless_quantity_is_refused() -> None:
    """Bug: a length of the run that is 0 or NaN makes every length 0 or NaN."""
    for bad in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="tokens_per_step must be finite and above 0"):
            Length.parse("1tok").resolve(RunLength(tokens_per_step=bad))
