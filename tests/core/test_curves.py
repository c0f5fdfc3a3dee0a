import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from argument_ranges import check_range
from hypothesis import assume, given
from hypothesis import strategies as st

from stabletrain.core.curves import (
    Constant,
    CosineRestarts,
    Curve,
    Exponential,
    MultiStep,
    OneCycle,
    Polynomial,
    Power,
    Tail,
    Triangular,
    Warmup,
    descent,
    rewarm_factor,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "schedules.json").read_text())["cases"]
REFERENCE = {
    (case["source"]["impl"], case["name"]): {int(index): lr for index, lr in case["lr"].items()} for case in VECTORS
}


def wsd(shape: Any, min_factor: float = 0.0, decay: int = 20) -> Tail:
    return Tail(Constant(), 90, decay, shape, min_factor)


def warmed(body: Curve) -> Warmup:
    return Warmup(10, body, from_zero=True)


SAME: dict[tuple[str, str], Curve] = {
    ("transformers", "constant_with_warmup"): warmed(Constant()),
    ("transformers", "cosine"): warmed(wsd("cosine", decay=90)),
    ("transformers", "polynomial_p2"): warmed(Polynomial(90, power=2.0, min_factor=1e-7)),
    ("transformers", "cosine_min_lr_0p1"): warmed(wsd("cosine", 0.1, decay=90)),
    ("transformers", "wsd_cosine"): warmed(wsd("cosine")),
    ("transformers", "zero_warmup_cosine"): Warmup(0, Tail(Constant(), 100, 100, "cosine")),
    ("OLMo-core", "linear_with_warmup"): warmed(wsd("linear", 0.1, decay=90)),
    ("OLMo-core", "cos_with_warmup_alpha0"): warmed(wsd("cosine", decay=90)),
    ("OLMo-core", "wsd_fraction"): warmed(wsd("linear")),
    ("OLMo-core", "power"): warmed(Tail(Power(10, exponent=-0.51), 90, 20, "linear")),
    ("torchtitan", "wsd_linear_decay_ratio_0.2_min_0.1"): Warmup(10, wsd("linear", 0.1)),
    ("torchtitan", "wsd_sqrt_decay_ratio_0.2_min_0.0"): Warmup(10, wsd("1-sqrt")),
    ("torchtitan", "wsd_sqrt_decay_ratio_None_min_0.1"): Warmup(10, wsd("1-sqrt", 0.1, decay=90)),
    ("torchtitan", "wsd_cosine_decay_ratio_0.2_min_0.1"): Warmup(10, wsd("cosine", 0.1)),
    ("torch", "OneCycleLR"): OneCycle(100, rise=0.3 * 101 - 1, start_factor=1 / 25, min_factor=1 / 25e4),
    ("torch", "ExponentialLR"): Exponential(0.95),
    ("torch", "CosineAnnealingWarmRestarts"): CosineRestarts(20 + 40 + 80, cycles=3, growth=2),
}


@pytest.mark.parametrize("key", list(REFERENCE), ids="/".join)
def test_matches_the_reference_implementation(key: tuple[str, str]) -> None:
    # an off-by-one at either join, or another meaning of the final factor, shows in the third digit
    for step, expected in REFERENCE[key].items():
        assert SAME[key].factor(step) == pytest.approx(expected, rel=1e-12, abs=1e-15), f"index {step}"


@pytest.mark.parametrize("name", ["constant_with_warmup", "cosine", "wsd_cosine"])
def test_differs_from_transformers_on_purpose_no_batch_is_spent_on_a_rate_of_zero(name: str) -> None:
    """Bug: a first step at rate 0, or a warm-up that reaches 1 a step late."""
    reference, same = REFERENCE["transformers", name], SAME["transformers", name]
    assert isinstance(same, Warmup)
    ours = Warmup(same.steps, same.body)
    assert reference[0] == 0.0
    assert ours.factor(0) == 0.1
    assert ours.factor(9) == 1.0
    assert all(ours.factor(step) == pytest.approx(lr, rel=1e-12) for step, lr in reference.items() if step >= 10)


def test_differs_from_torch_on_purpose_one_cycle_ends_with_the_run_not_before_it() -> None:
    """Bug: the last step of the run has the final rate already."""
    torchs = REFERENCE["torch", "OneCycleLR"]
    ours = OneCycle(101, rise=30, start_factor=1 / 25, min_factor=1 / 25e4)
    assert ours.factor(30) == 1.0
    assert ours.factor(101) == 1 / 25e4
    assert ours.factor(99) > torchs[99]


lengths = st.integers(1, 5000)
shares = st.floats(0, 1)
shapes = st.sampled_from(["linear", "cosine", "1-sqrt"])


@st.composite
def tails(draw: st.DrawFn, body: st.SearchStrategy[Curve]) -> Tail:
    steps = draw(lengths)
    return Tail(draw(body), steps, draw(st.integers(0, steps)), draw(shapes), draw(shares))


@st.composite
def one_cycles(draw: st.DrawFn) -> OneCycle:
    steps = draw(lengths)
    return OneCycle(steps, draw(st.integers(0, steps)), draw(st.floats(1e-6, 1)), draw(shares))


powers = st.builds(Power, st.floats(0.5, 1e6), st.floats(-3, 0), shares)
exponentials = st.builds(Exponential, st.floats(1e-6, 1), st.floats(0.5, 1e6), shares)
descents = st.one_of(
    st.just(Constant()),
    tails(st.one_of(st.just(Constant()), powers, exponentials)),
    powers,
    exponentials,
    st.builds(MultiStep, st.lists(lengths).map(sorted).map(tuple), st.floats(1e-6, 1), shares),
    st.builds(Polynomial, lengths, st.floats(0.1, 10), shares),
)
bodies = st.one_of(
    descents,
    st.builds(CosineRestarts, lengths, st.integers(1, 9), st.floats(0.5, 3), shares),
    st.builds(Triangular, lengths, st.integers(1, 9), st.floats(1e-6, 1)),
    one_cycles(),
)
curves = st.builds(Warmup, st.integers(0, 300), bodies)
steps = st.integers(0, 12000)


@given(curves, steps)
def test_factors_stay_in_bounds_and_are_the_same_every_time(curve: Curve, step: int) -> None:
    """Bug: a factor below 0 or above 1 at some length; a curve with hidden state."""
    factor = curve.factor(step)
    assert type(factor) is float
    assert -1e-15 <= factor <= 1 + 1e-12
    assert pickle.loads(pickle.dumps(curve)).factor(step) == factor


@given(st.integers(1, 300), bodies)
def test_warmup_begins_at_one_part_and_joins_the_body_without_a_jump(warmup: int, body: Curve) -> None:
    """Bug: the climb ends one step early or late, or falls in between."""
    curve = Warmup(warmup, body)
    assert curve.factor(0) == pytest.approx(body.factor(0) / warmup)
    assert curve.factor(0) > 0
    assert curve.factor(warmup - 1) == pytest.approx(body.factor(0))
    assert curve.factor(warmup) == body.factor(0)
    climb = [curve.factor(step) for step in range(warmup)]
    assert climb == sorted(climb)


@given(descents, steps, steps)
def test_descents_never_rise(body: Curve, one: int, other: int) -> None:
    """Bug: a wrong sign, or a tail that starts above the body."""
    first, second = sorted((one, other))
    assert body.factor(first) >= body.factor(second) - 1e-12


@given(bodies)
def test_continuous_but_for_milestones_and_restarts(body: Curve) -> None:
    # a tail that forgets the body's value at its start, or a rise that ends off the descent, would jump
    assume(not isinstance(body, MultiStep | CosineRestarts) and getattr(body, "power", 1) >= 0.5)
    assume(not isinstance(body, OneCycle) or body.rise < body.steps)
    end = getattr(body, "steps", 3000)
    joins = [end - getattr(body, "decay", 0), getattr(body, "rise", end / 2), end]
    for join in joins:
        assert body.factor(join + 1e-9) == pytest.approx(body.factor(max(join - 1e-9, 0)), abs=2e-3)


@given(bodies, st.integers(0, 10**9))
def test_the_final_value_is_held_beyond_the_horizon(body: Curve, later: int) -> None:
    """Bug: after the end of a curve the rate rises again or becomes negative."""
    assume(hasattr(body, "steps") and getattr(body, "decay", 1))
    end = body.factor(body.steps)  # type: ignore[attr-defined]
    assert body.factor(body.steps + later) == end  # type: ignore[attr-defined]
    top = body.body.factor(body.steps - body.decay) if isinstance(body, Tail) else 1.0
    assert end == pytest.approx(min(body.min_factor, top))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "body",
    [
        Tail(Constant(), 1, 1, "cosine"),
        Tail(Constant(), 1, 1, "1-sqrt"),
        Tail(Constant(), 1, 0, "linear", 1.0),
        CosineRestarts(1, 1),
        Polynomial(1, 2),
    ],
)
@pytest.mark.parametrize("warmup", [0, 1])
def test_a_run_of_one_step_takes_it_at_the_full_rate(warmup: int, body: Curve) -> None:
    """Bug: a division by zero, or a single step at rate 0."""
    assert Warmup(warmup, body).factor(0) == 1.0


def test_restarts_begin_at_the_top_and_grow() -> None:
    """Bug: cycles of equal length, or restarts one step off."""
    curve = CosineRestarts(140, cycles=3, growth=2, min_factor=0.1)
    assert [curve.factor(step) for step in (0, 20, 60)] == [1.0, 1.0, 1.0]
    assert [curve.factor(step) for step in (10, 40, 100)] == pytest.approx([0.55] * 3)
    assert curve.factor(140) == 0.1


def test_the_inverse_square_root_is_the_one_of_the_transformer() -> None:
    """Bug: another timescale or exponent than in the Transformer paper."""
    curve = Warmup(4000, Power(4000, exponent=-0.5))
    for step in (4000, 16000, 123456):
        assert curve.factor(step) == pytest.approx(math.sqrt(4000 / step))


def test_a_tail_keeps_a_body_that_is_already_below_the_final_factor() -> None:
    """Bug: a tail that raises the rate to its final factor."""
    curve = Tail(Power(1, exponent=-1), 100, 50, "linear", min_factor=0.5)
    assert curve.factor(100) == curve.factor(50) == pytest.approx(1 / 51)


@given(st.integers(0, 1000), st.integers(0, 100), st.integers(0, 2000))
def test_rewarm_is_a_climb_between_ones(start: int, length: int, step: int) -> None:
    """Bug: a rate of 0 in the first step, or a climb that is one step longer."""
    factor = rewarm_factor(step, start, length)
    assert 0 < factor <= 1
    if step < start or step >= start + length - 1:
        assert factor == 1.0
    elif length:
        assert factor == (step - start + 1) / length


@given(st.floats(), shapes)
def test_descent_is_cut_to_its_ends(progress: float, shape: Any) -> None:
    """Bug: a factor below 0 or above 1 outside of the descent."""
    assume(not math.isnan(progress))
    assert 0.0 <= descent(progress, shape) <= 1.0


TINY = 5e-324
SHARE = [0, 1], [-TINY, math.nextafter(1, 2), math.nan]
ABOVE_0 = [TINY], [0, math.inf, math.nan]
TO_1 = [TINY, 1], [0, math.nextafter(1, 2), math.nan]
TOTAL = [1], [math.nextafter(1, 0), math.inf, math.nan]
CYCLES = [1, 2], [0, 1.5, math.nan]


@pytest.mark.parametrize(
    ("make", "argument", "expected", "values"),
    [
        (lambda x: Warmup(x, Constant()), "lr_warmup", "at least 0 steps", ([0], [-1])),
        (lambda x: Tail(Constant(), x, 0), "total", "at least 1 step", TOTAL),
        (lambda x: Tail(Constant(), 10, x), "decay", "at most the 10 steps after the warm-up", ([0, 10], [-1, 11])),
        (lambda x: Tail(Constant(), 10, 5, "linear", x), "min_factor", "from 0 to 1", SHARE),
        (lambda x: CosineRestarts(x, 1), "total", "at least 1 step", TOTAL),
        (lambda x: CosineRestarts(10, x), "cycles", "a whole number >= 1", CYCLES),
        (lambda x: CosineRestarts(10, 2, x), "cycle_growth", "above 0", ABOVE_0),
        (lambda x: CosineRestarts(10, 2, 1.0, x), "min_factor", "from 0 to 1", SHARE),
        (lambda x: Power(x), "timescale", "above 0 steps", ABOVE_0),
        (lambda x: Power(1, x), "exponent", "at most 0", ([0, -9], [TINY, -math.inf, math.nan])),
        (lambda x: Power(1, -1, x), "min_factor", "from 0 to 1", SHARE),
        (lambda x: Exponential(x), "gamma", "above 0 and at most 1", TO_1),
        (lambda x: Exponential(0.5, x), "gamma_every", "above 0 steps", ABOVE_0),
        (lambda x: Exponential(0.5, 1, x), "min_factor", "from 0 to 1", SHARE),
        (
            lambda x: MultiStep(x, 0.1),
            "milestones",
            "ascending, none inside the warm-up",
            ([(), (0,), (2, 2)], [(3, 2), (-1,)]),
        ),
        (lambda x: MultiStep((1,), x), "gamma", "above 0 and at most 1", TO_1),
        (lambda x: MultiStep((1,), 0.1, x), "min_factor", "from 0 to 1", SHARE),
        (lambda x: Polynomial(x, 1), "total", "at least 1 step", TOTAL),
        (lambda x: Polynomial(10, x), "power", "above 0", ABOVE_0),
        (lambda x: Polynomial(10, 1, x), "min_factor", "from 0 to 1", SHARE),
        (lambda x: Triangular(x, 1, 0.5), "total", "at least 1 step", TOTAL),
        (lambda x: Triangular(10, x, 0.5), "cycles", "a whole number >= 1", CYCLES),
        (lambda x: Triangular(10, 1, x), "min_factor", "above 0 (where cycles begin) and at most 1", TO_1),
        (lambda x: OneCycle(x, 0), "total", "at least 1 step", TOTAL),
        (lambda x: OneCycle(10, x), "lr_warmup", "at most the total of 10 steps", ([0, 10], [-1, 11])),
        (lambda x: OneCycle(10, 5, x), "start_factor", "above 0 and at most 1", TO_1),
        (lambda x: OneCycle(10, 5, 0.5, x), "min_factor", "from 0 to 1", SHARE),
    ],
)
def test_ranges_of_the_arguments(make: Any, argument: str, expected: str, values: tuple[list[Any], list[Any]]) -> None:
    """Bug: a range off by one, or a message with another name, range or key."""
    accepted, refused = ([{argument: value} for value in each] for each in values)
    check_range(lambda **given: make(given[argument]), "schedule", "schedule", argument, expected, accepted, refused)


@pytest.mark.parametrize(
    ("curve", "factors"),
    [
        (Triangular(8, cycles=2, min_factor=0.5), [0.5, 0.75, 1.0, 0.75, 0.5, 0.75, 1.0, 0.75, 0.5, 0.5]),
        (Triangular(4, cycles=1, min_factor=0.25), [0.25, 0.625, 1.0, 0.625, 0.25, 0.25]),
        (Exponential(0.25, every=2, min_factor=0.1), [1.0, 0.5, 0.25, 0.125, 0.1]),
        (MultiStep((0, 2), gamma=0.5, min_factor=0.3), [0.5, 0.5, 0.3]),
        (Polynomial(4, power=2, min_factor=0.5), [1.0, 0.78125, 0.625, 0.53125, 0.5, 0.5]),
        (Power(4, exponent=-1.0, min_factor=0.6), [1.0, 0.8, 4 / 6, 0.6]),
        (Warmup(2, Exponential(0.25, every=2)), [0.5, 1.0, 1.0, 0.5]),
        (Warmup(2, Triangular(4, 1, 0.5), from_zero=True), [0.0, 0.25, 0.5, 0.75, 1.0]),
        (Tail(Power(4, exponent=-1.0), steps=4, decay=2, shape="linear"), [1.0, 0.8, 4 / 6, 2 / 6, 0.0, 0.0]),
    ],
    ids=str,
)
def test_factors_calculated_by_hand(curve: Curve, factors: list[float]) -> None:
    """Bug: a wrong sign or a wrong divisor where no reference implementation has the curve."""
    assert [curve.factor(step) for step in range(len(factors))] == pytest.approx(factors)
