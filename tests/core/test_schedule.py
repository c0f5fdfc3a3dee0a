"""From the arguments of a schedule and the length of a run to one curve, and every refusal with its whole message."""

import itertools
from collections.abc import Iterator
from typing import Any, get_args

import pytest

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
)
from stabletrain.core.lengths import RunLength
from stabletrain.core.schedule import USED_BY, Kind, Schedule
from stabletrain.errors import UserError
from stabletrain.settings import by_config

RUN = RunLength(total_steps=100, steps_per_epoch=20, tokens_per_step=10)
ONE = Constant()


@pytest.fixture(autouse=True)
def keys() -> Iterator[None]:
    """Messages name config keys."""
    with by_config():
        yield


@pytest.mark.parametrize(
    ("arguments", "curve"),
    [
        ({}, Warmup(2, ONE)),
        ({"kind": "constant", "lr_warmup": 0}, Warmup(0, ONE)),
        ({"kind": "constant", "warmup_from_zero": True}, Warmup(2, ONE, from_zero=True)),
        ({"kind": "exponential"}, Warmup(2, Exponential(0.1, 50, 0.0))),
        (
            {"kind": "exponential", "gamma": 0.5, "gamma_every": "1ep", "min_factor": 0.2},
            Warmup(2, Exponential(0.5, 20, 0.2)),
        ),
        ({"kind": "step"}, Warmup(2, MultiStep((48, 73), 0.1, 0.0))),
        (
            {"kind": "step", "lr_warmup": 4, "milestones": [4, "2ep", 40], "gamma": 0.5, "min_factor": 0.1},
            Warmup(4, MultiStep((0, 36, 36), 0.5, 0.1)),
        ),
        ({"kind": "step", "milestones": []}, Warmup(2, MultiStep((), 0.1, 0.0))),
        ({"kind": "inverse_sqrt", "lr_warmup": 10}, Warmup(10, Power(10, -0.5, 0.0))),
        ({"kind": "inverse_sqrt", "timescale": "1ep", "min_factor": 0.3}, Warmup(2, Power(20, -0.5, 0.3))),
        ({"kind": "linear"}, Warmup(2, Tail(ONE, 98, 98, "linear", 0.0))),
        ({"kind": "cosine", "min_factor": 0.1, "total": "3ep"}, Warmup(1, Tail(ONE, 59, 59, "cosine", 0.1))),
        ({"kind": "cosine", "lr_warmup": 100}, Warmup(100, Tail(ONE, 1, 1, "cosine", 0.0))),
        ({"kind": "wsd"}, Warmup(2, Tail(ONE, 98, 20, "1-sqrt", 0.0))),
        (
            {
                "kind": "wsd",
                "lr_warmup": "50tok",
                "tokens_per_step": 10,
                "decay": 95,
                "tail": "linear",
                "min_factor": 0.5,
            },
            Warmup(5, Tail(ONE, 95, 95, "linear", 0.5)),
        ),
        ({"kind": "power"}, Warmup(2, Tail(Power(2, -0.51, 0.0), 98, 20, "1-sqrt", 0.0))),
        (
            {"kind": "power", "timescale": 7, "exponent": -1, "decay": 8, "tail": "cosine", "min_factor": 0.5},
            Warmup(2, Tail(Power(7, -1, 0.0), 98, 8, "cosine", 0.5)),
        ),
        ({"kind": "polynomial"}, Warmup(2, Polynomial(98, 2.0, 0.0))),
        ({"kind": "polynomial", "power": 1.0, "min_factor": 0.2}, Warmup(2, Polynomial(98, 1.0, 0.2))),
        ({"kind": "cyclical", "cycles": 2, "min_factor": 0.2}, Warmup(2, Triangular(98, 2, 0.2))),
        ({"kind": "cosine_restarts"}, Warmup(2, CosineRestarts(98, 4, 1.0, 0.0))),
        (
            {"kind": "cosine_restarts", "cycles": 3, "cycle_growth": 2.0, "min_factor": 0.2},
            Warmup(2, CosineRestarts(98, 3, 2.0, 0.2)),
        ),
        ({"kind": "one_cycle", "lr_warmup": "30%"}, OneCycle(100, 30, 0.04, 0.0)),
        (
            {"kind": "one_cycle", "lr_warmup": 0, "start_factor": 1, "min_factor": 0.2, "total": 40},
            OneCycle(40, 0, 1, 0.2),
        ),
    ],
    ids=str,
)
def test_the_curve_of_every_kind(arguments: dict[str, Any], curve: Curve) -> None:
    """Bugs: a length that counts the warm-up twice or not at all; an argument that goes to the wrong parameter."""
    assert Schedule(**arguments).curve(RUN) == curve


CHANGED = {
    "min_factor": 0.5,
    "decay": "30%",
    "tail": "linear",
    "cycles": 2,
    "cycle_growth": 2.0,
    "timescale": 7,
    "exponent": -0.2,
    "gamma": 0.5,
    "gamma_every": "10%",
    "milestones": ("40%",),
    "power": 3.0,
    "start_factor": 0.5,
    "warmup_from_zero": True,
}
NEEDED = {"cyclical": {"min_factor": 0.1}}
"""Arguments without which a kind is refused."""


@pytest.mark.parametrize(("kind", "argument"), list(itertools.product(get_args(Kind), CHANGED)))
def test_an_argument_changes_the_curve_or_is_refused(kind: Kind, argument: str) -> None:
    """Bug: an argument that a kind ignores is accepted, and a sweep over it compares equal runs."""
    value = CHANGED[argument]
    needed = NEEDED.get(kind, {})
    if kind in USED_BY[argument]:
        changed = Schedule(kind, **{**needed, argument: value}).curve(RUN)
        plain = Schedule(kind, **needed).curve(RUN)
        assert [changed.factor(step) for step in range(100)] != [plain.factor(step) for step in range(100)]
        return
    with pytest.raises(UserError) as error:
        Schedule(kind, **{**needed, argument: value})
    kinds = ", ".join(USED_BY[argument])
    assert str(error.value) == (
        f"schedule: {argument}={value!r} has no effect with kind={kind!r}; it belongs to {kinds} "
        f"(config key schedule.{argument})"
    )


def test_arguments_of_all_kinds_are_not_tied_to_one() -> None:
    """Bug: lengths of the run refused because they are missing from the table."""
    given = Schedule("constant", lr_warmup=1, total=9, tokens_per_step=5.0)
    assert given.curve(RunLength()) == Warmup(1, ONE)


KINDS = (
    "constant, linear, cosine, cosine_restarts, wsd, inverse_sqrt, exponential, step, polynomial, cyclical, one_cycle, "
    "power"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cosin"}, f"schedule: kind must be one of {KINDS}, got 'cosin' (config key schedule.kind)"),
        (
            {"kind": "wsd", "tail": "sqrt"},
            "schedule: tail must be one of linear, cosine, 1-sqrt, got 'sqrt' (config key schedule.tail)",
        ),
        (
            {"kind": "linear", "lr_warmup": 11, "total": 10},
            "schedule: lr_warmup must be no longer than the total of 10 steps, got 11 (config key schedule.lr_warmup)",
        ),
        (
            {"kind": "linear", "lr_warmup": "101%"},
            "schedule: lr_warmup must be no longer than the whole run, got '101%' (config key schedule.lr_warmup)",
        ),
        (
            {"kind": "wsd", "lr_warmup": 6, "decay": 5, "total": 10},
            "schedule: lr_warmup=6 and decay=5 together are longer than the total of 10 steps (config keys "
            "schedule.lr_warmup, schedule.decay)",
        ),
        (
            {"kind": "power", "lr_warmup": "60%", "decay": "41%"},
            "schedule: lr_warmup='60%' and decay='41%' together are longer than the whole run (config keys "
            "schedule.lr_warmup, schedule.decay)",
        ),
        (
            {"kind": "inverse_sqrt", "lr_warmup": 0},
            "schedule: kind='inverse_sqrt' without a warm-up needs a timescale (config key schedule.timescale)",
        ),
        (
            {"kind": "power", "timescale": 0},
            "schedule: kind='power' without a warm-up needs a timescale (config key schedule.timescale)",
        ),
        (
            {"kind": "step", "gamma": 0.0},
            "schedule: gamma must be above 0 and at most 1, got 0.0 (config key schedule.gamma)",
        ),
        (
            {"kind": "step", "min_factor": 2.0},
            "schedule: min_factor must be from 0 to 1, got 2.0 (config key schedule.min_factor)",
        ),
        (
            {"kind": "step", "lr_warmup": 2, "milestones": (10, 5)},
            "schedule: milestones must be ascending, got (10, 5) (config key schedule.milestones)",
        ),
        (
            {"kind": "cosine", "total": 0},
            "schedule: total must be above 0, got 0 (config key schedule.total)",
        ),
        (
            {"kind": "constant", "tokens_per_step": float("nan")},
            "schedule: tokens_per_step must be above 0 and finite, or None, got nan (config key "
            "schedule.tokens_per_step)",
        ),
        (
            {"kind": "cyclical"},
            "schedule: min_factor must be above 0 (where cycles begin) and at most 1, got 0.0 (config key "
            "schedule.min_factor)",
        ),
        (
            {"lr_warmup": "5tok"},
            "schedule.lr_warmup: 5tok cannot be turned into steps without tokens_per_step; set tokens_per_step (tokens "
            "in one step, over all ranks), or give the length in steps",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_mistake_is_refused_without_the_run(arguments: dict[str, Any], message: str) -> None:
    """Bugs: a mistake found only after the data has been loaded; a message with the wrong key."""
    with pytest.raises(UserError) as error:
        Schedule(**arguments)
    assert str(error.value) == message


@pytest.mark.parametrize("argument", ["lr_warmup", "total", "decay", "timescale", "gamma_every"])
def test_a_length_that_cannot_be_read_is_refused_by_its_key(argument: str) -> None:
    """Bug: a misspelt length reported by another key, or only when it is needed."""
    kind = USED_BY.get(argument, ("linear",))[0]
    with pytest.raises(UserError, match=rf"^schedule\.{argument}: expected .*, got '5 parsecs'$"):
        Schedule(kind, **{argument: "5 parsecs"})


def test_a_milestone_that_cannot_be_read_is_refused_by_its_key() -> None:
    """Bug: a message that does not name the milestone."""
    with pytest.raises(UserError, match=r"^schedule\.milestones: expected .*, got '5 parsecs'$"):
        Schedule("step", milestones=[5, "5 parsecs"])


def test_lengths_in_several_units_are_compared_when_the_run_is_known() -> None:
    """Bug: a valid schedule refused, because epochs have an assumed length until the run is known."""
    mixed = Schedule("wsd", lr_warmup="1ep", decay=70, total=90)
    assert mixed.curve(RUN) == Warmup(20, Tail(ONE, 70, 70, "1-sqrt", 0.0))
    with pytest.raises(UserError, match="together are longer than the total of 90 steps"):
        mixed.curve(RunLength(steps_per_epoch=21))


@pytest.mark.parametrize("milestones", [("5", "50%", 8), (1, 5)])
def test_milestones_must_ascend_from_the_end_of_the_warm_up(milestones: tuple[int, ...]) -> None:
    """Bug: a milestone within the warm-up, which would come to nothing."""
    with pytest.raises(UserError) as error:
        Schedule("step", lr_warmup=2, milestones=milestones).curve(RUN)
    assert str(error.value) == (
        f"schedule: milestones must be ascending and after the warm-up of 2 steps, got {milestones!r} "
        "(config key schedule.milestones)"
    )


def test_a_milestone_in_an_unknown_unit_is_refused_by_its_key() -> None:
    """Bug: a message about a length without the argument that has it."""
    with pytest.raises(UserError, match=r"^schedule\.milestones: 1ep cannot be turned into steps"):
        Schedule("step", milestones=["1ep"]).curve(RunLength(total_steps=10))


ENDLESS = ["constant", "exponential", "step", "inverse_sqrt"]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_only_curves_with_an_end_need_the_end_of_the_run(kind: Kind) -> None:
    """Bugs: streaming data refused for a curve that has no end; or a curve with an end that begins without it."""
    needed = {"lr_warmup": 2, **NEEDED.get(kind, {})}
    needed |= {"gamma_every": 5} if kind == "exponential" else {"milestones": [5]} if kind == "step" else {}
    needed |= {"decay": 5} if kind in USED_BY["decay"] else {}
    if kind in ENDLESS:
        assert Schedule(kind, **needed).curve(RunLength()).factor(2) == 1.0
        return
    with pytest.raises(UserError) as error:
        Schedule(kind, **needed).curve(RunLength())
    assert str(error.value) == (
        f"schedule: kind={kind!r} needs the length of the run, which is unknown: set trainer.max_steps or "
        "trainer.max_epochs, or give schedule.total in steps"
    )


def test_total_replaces_the_length_of_the_run() -> None:
    """Bug: a share of the run taken of the run and not of `total`."""
    schedule = Schedule("linear", lr_warmup="10%", total=50)
    assert schedule.horizon(RUN) == RunLength(total_steps=50, steps_per_epoch=20, tokens_per_step=10)
    assert schedule.steps("lr_warmup", schedule.horizon(RUN)) == 5
    assert Schedule("linear").horizon(RUN) is RUN


def test_milestones_are_copied() -> None:
    """Bug: a schedule that changes with the list it was made from."""
    milestones: list[int | str] = [50]
    schedule = Schedule("step", milestones=milestones)
    milestones.append(60)
    assert schedule.milestones == (50,)
