"""The one type for lengths of time: steps, epochs, tokens, or a share of the run.

A length is written the way it is said and turned into applied optimizer steps once the run is known:

| written            | means                                        | needs to know     |
|--------------------|----------------------------------------------|-------------------|
| `500` or `"500"`   | 500 applied optimizer steps                  | nothing           |
| `"3ep"`            | 3 passes over the training data (`"0.5ep"`)  | `steps_per_epoch` |
| `"1e9tok"`         | one thousand million tokens                  | `tokens_per_step` |
| `"2%"`             | 2 % of the run                               | `total_steps`     |

Rounding: to the nearest whole step, halves up, from the decimal digits as written (`"0.3%"` of 1000 is exactly 3); and
a length above zero is never rounded down to zero, so a warm-up of `"2%"` exists in a run of ten steps too.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from stabletrain.errors import UserError

Unit = Literal["steps", "epochs", "tokens", "percent"]
LengthLike = int | str
"""How a length is given in a signature or a config: steps as an integer, anything else as text (`"3ep"`)."""

_SUFFIXES: dict[Unit, str] = {"epochs": "ep", "tokens": "tok", "percent": "%", "steps": ""}
_FORMS = "500 (optimizer steps), '3ep' (epochs), '1e9tok' (tokens) or '2%' (of the run)"
_WAY_OUT: dict[str, str] = {
    "total_steps": "the run has no known end: set trainer.max_steps or trainer.max_epochs, or give the length in steps",
    "steps_per_epoch": "the training data has no known length: give the length in steps",
    "tokens_per_step": "set tokens_per_step (tokens in one step, over all ranks), or give the length in steps",
}


@dataclass(frozen=True, kw_only=True)
class RunLength:
    """What is known about a run's length; None is unknown.

    Args:
        total_steps: applied optimizer steps in the whole run, from its very first step; >= 1.
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
        if not math.isfinite(self.value) or self.value < 0:
            raise UserError(f"length: expected a finite amount of at least 0 in one of the forms {_FORMS}")
        if self.unit == "steps" and self.value != int(self.value):
            raise UserError("length: expected a whole number of steps (a share of the run is written '2%')")

    @classmethod
    def parse(cls, value: "int | float | str | Length", *, name: str = "length") -> "Length":
        """Read a length.

        Args:
            value: steps as a number, or text in one of the four forms; a Length is returned as it is.
            name: what to call the value in an error: the config key.

        Raises:
            UserError: if the value is none of the four forms.

        >>> Length.parse("3ep")
        Length(value=3, unit='epochs')
        """
        if isinstance(value, Length):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise UserError(f"{name}: expected {_FORMS}, got {value!r} of type {type(value).__name__}")
        text = str(value).strip()
        unit: Unit = next(unit for unit, suffix in _SUFFIXES.items() if text.endswith(suffix))
        number = text.removesuffix(_SUFFIXES[unit]).rstrip()
        try:
            amount = int(number) if number.isdecimal() else float(number)
            return cls(int(amount) if math.isfinite(amount) and amount == int(amount) else amount, unit)
        except ValueError as error:
            why = str(error).removeprefix("length: ") if str(error).startswith("length") else f"expected {_FORMS}"
            raise UserError(f"{name}: {why}, got {value!r}") from None

    def resolve(self, run: RunLength, *, name: str = "length") -> int:
        """Turn the length into applied optimizer steps, rounded as the module says.

        Args:
            run: what is known about the run.
            name: what to call the length in an error: the config key.

        Raises:
            UserError: if the run does not know the quantity that the unit needs.
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


def _known(run: RunLength, quantity: str, length: Length, name: str) -> Fraction:
    value = getattr(run, quantity)
    if value is None:
        raise UserError(f"{name}: {length} cannot be turned into steps without {quantity}; {_WAY_OUT[quantity]}")
    if not value > 0 or not math.isfinite(value):
        raise UserError(f"{name}: {quantity} must be finite and above 0, got {value!r}")
    return Fraction(str(value))
