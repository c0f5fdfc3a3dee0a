"""Amounts with a unit, as they are written in configs and signatures: one parser for each kind.

| kind               | written                                         | parser              | result               |
|--------------------|-------------------------------------------------|---------------------|----------------------|
| length             | `500`, `"500"`, `"3ep"`, `"1e9tok"`, `"2%"`     | `Length.parse`      | `Length`             |
| interval of saving | a length, or `"30s"`, `"10min"`, `"2h"`, `"1d"` | `intervals.parse`   | `Length`, or seconds |
| time               | seconds, or `"30s"`, `"5min"`, `"2h"`, `"1d"`   | `intervals.seconds` | seconds              |
| amount of memory   | `"8GB"`, `"500MiB"`                             | `bytes.parse`       | bytes                |

Each parser takes the config key as `name` and raises a `UserError` of the form "key: expected FORMS, got VALUE". They
share `number_and_unit`. A count of steps that is never anything else (`every: int` of a rule) is a plain integer.

Lengths are turned into applied optimizer steps once the run is known:

| written          | means                                       | needs             |
|------------------|---------------------------------------------|-------------------|
| `500` or `"500"` | 500 applied optimizer steps                 | nothing           |
| `"3ep"`          | 3 passes over the training data (`"0.5ep"`) | `steps_per_epoch` |
| `"1e9tok"`       | 10^9 tokens                                 | `tokens_per_step` |
| `"2%"`           | 2 % of the run                              | `total_steps`     |

Rounding: to the nearest whole step, halves up, from the decimal digits as written (`"0.3%"` of 1000 is exactly 3). A
length above zero is at least one step, so a warm-up of `"2%"` exists in a run of ten steps too.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from stabletrain.errors import UserError

Unit = Literal["steps", "epochs", "tokens", "percent"]
LengthLike = int | str
"""How a length is given in a signature or a config: steps as an integer, anything else as text (`"3ep"`)."""

_SUFFIXES: dict[Unit, str] = {"epochs": "ep", "tokens": "tok", "percent": "%", "steps": ""}
FORMS = "500 (optimizer steps), '3ep' (epochs), '1e9tok' (tokens) or '2%' (of the run)"
"""The forms of a length, for messages."""
_REMEDY: dict[str, str] = {
    "total_steps": "the run has no known end: set trainer.max_steps or, unless the module steps by hand, "
    "trainer.max_epochs, or give the length in steps",
    "steps_per_epoch": "the training data has no known length: give the length in steps",
    "tokens_per_step": "set tokens_per_step (tokens in one step, over all ranks), or give the length in steps",
}


def number_and_unit(text: str, units: Iterable[str]) -> tuple[int | float, str] | None:
    """Split text such as `"1.5h"` into a number and a unit; None if there is no such unit, or no number before it.

    Args:
        text: a number in Python's notation, directly or after spaces followed by a unit.
        units: the known units; `""` accepts a bare number.

    >>> number_and_unit(" 1e3 tok ", ["ep", "tok"]), number_and_unit("8 parsecs", ["s", "min"])
    ((1000, 'tok'), None)
    """
    text = text.strip()
    unit = max((unit for unit in units if text.endswith(unit)), key=len, default=None)
    if unit is None:
        return None
    number = text.removesuffix(unit).rstrip()
    try:
        value = int(number) if number.isdecimal() else float(number)
    except ValueError:
        return None
    return int(value) if math.isfinite(value) and value == int(value) else value, unit


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """What is known about a run's length; None is unknown.

    Args:
        total_steps: applied optimizer steps in the whole run, from its first step; >= 1.
        steps_per_epoch: optimizer steps in one pass over the training data; > 0, fractions allowed.
        tokens_per_step: tokens in one optimizer step, over all ranks and micro-batches; > 0.
    """

    total_steps: int | None = None
    steps_per_epoch: float | None = None
    tokens_per_step: float | None = None


@dataclass(frozen=True)
class Length:
    """A length of time in one of four units.

    Args:
        value: the amount; finite, >= 0; whole if the unit is steps.
        unit: `"steps"`, `"epochs"`, `"tokens"` or `"percent"` (of the run).

    Raises:
        UserError: if the amount is negative, not finite, or not a whole number of steps.

    >>> Length.parse("2%").resolve(RunLength(total_steps=1000))
    20
    >>> str(Length.parse(" 1e9 tok "))
    '1e9tok'
    """

    value: float
    unit: Unit = "steps"

    def __post_init__(self) -> None:
        if self.unit not in _SUFFIXES:
            raise UserError(f"length: unknown unit {self.unit!r}; expected one of {', '.join(_SUFFIXES)}")
        if problem := _problem(self.value, self.unit):
            raise UserError(f"length: expected {problem}, got {self.value!r}")

    @classmethod
    def parse(cls, value: "int | float | str | Length", *, name: str = "length") -> "Length":
        """Read a length.

        Args:
            value: steps as a number, or text in one of the four forms; a Length is returned as it is.
            name: the config key, for messages.

        Raises:
            UserError: if the value has none of the four forms.

        >>> Length.parse("3ep")
        Length(value=3, unit='epochs')
        """
        if isinstance(value, Length):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise UserError(f"{name}: expected {FORMS}, got {value!r} of type {type(value).__name__}")
        found = number_and_unit(str(value), _SUFFIXES.values())
        if found is None:
            raise UserError(f"{name}: expected {FORMS}, got {value!r}")
        unit = next(unit for unit, suffix in _SUFFIXES.items() if suffix == found[1])
        if problem := _problem(found[0], unit):
            raise UserError(f"{name}: expected {problem}, got {value!r}")
        return cls(found[0], unit)

    def resolve(self, run: RunLength, *, name: str = "length") -> int:
        """Turn the length into applied optimizer steps, rounded as the module's docstring says.

        Args:
            run: what is known about the run.
            name: the config key, for messages.

        Raises:
            UserError: if the quantity that the unit needs is unknown.
        """
        if self.unit == "steps":
            return int(self.value)
        amount = Fraction(str(self.value))
        if self.unit == "percent":
            steps = amount * _known(run, "total_steps", self, name) / 100
        elif self.unit == "epochs":
            steps = amount * _known(run, "steps_per_epoch", self, name)
        else:
            steps = amount / _known(run, "tokens_per_step", self, name)
        return max(math.floor(steps + Fraction(1, 2)), 1 if amount else 0)

    def __str__(self) -> str:
        short = f"{self.value:g}".replace("e+0", "e").replace("e+", "e")
        return f"{short if float(short) == self.value else self.value}{_SUFFIXES[self.unit]}"


def _problem(value: float, unit: Unit) -> str | None:
    """What is expected instead of an amount that no length can have; None if a length can have it."""
    if not math.isfinite(value) or value < 0:
        return f"a finite amount of at least 0 in one of the forms {FORMS}"
    if unit == "steps" and value != int(value):
        return "a whole number of steps (a share of the run is written '2%')"
    return None


def _known(run: RunLength, quantity: str, length: Length, name: str) -> Fraction:
    value = getattr(run, quantity)
    if value is None:
        raise UserError(f"{name}: {length} cannot be turned into steps without {quantity}; {_REMEDY[quantity]}")
    if not value > 0 or not math.isfinite(value):
        raise UserError(f"{name}: {quantity} must be finite and above 0, got {value!r}")
    return Fraction(str(value))
