"""The search space of ``stabletrain sweep``: ``--over KEY=log(LOW,HIGH)``, and the other kinds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from stabletrain.errors import UserError, did_you_mean

Kind = Literal["log", "linear", "int", "log_int", "choice"]
_ALIASES: dict[str, Kind] = {"interval": "linear", "uniform": "linear"}
"""Hydra's word, and Optuna's."""
_CALL = re.compile(r"(?P<kind>\w+)\((?P<inside>.*)\)", re.DOTALL)
_EXPECTED = "expected KEY=log(LOW,HIGH), KEY=linear(LOW,HIGH), KEY=int(LOW,HIGH), KEY=log_int(LOW,HIGH) or KEY=A,B,C"


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One key and its values.

    Args:
        key: config key, or a group such as ``plugins/clip``.
        kind: how the values are drawn: evenly in the logarithm, evenly, or one of a list.
        low: smallest value, of numbers.
        high: largest value.
        choices: as typed, of a list.
    """

    key: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether the values are whole numbers."""
        return self.kind in ("int", "log_int")

    @property
    def is_log(self) -> bool:
        """Whether the values are drawn evenly in the logarithm."""
        return self.kind in ("log", "log_int")

    @property
    def corners(self) -> tuple[str, ...]:
        """Values, as text, with which a config is checked before any run: the bounds, or all choices."""
        return self.choices or (self.text(self.low), self.text(self.high))

    def text(self, value: float | str) -> str:
        """Return a value as it is written into an override.

        Args:
            value: a number, or one of the choices.
        """
        return value if isinstance(value, str) else str(int(value)) if self.is_whole else repr(float(value))

    def shown(self, value: float | str) -> str:
        """Return a value for people, with four digits.

        Args:
            value: a number, or one of the choices.
        """
        return self.text(value) if isinstance(value, str) or self.is_whole else f"{value:.4g}"

    def __str__(self) -> str:
        inside = ",".join(self.choices or (self.text(self.low), self.text(self.high)))
        return f"{self.key}={self.kind}({inside})"


def parse_space(words: Sequence[str]) -> tuple[Dimension, ...]:
    """Return the dimensions that ``--over`` options describe.

    Args:
        words: at least one.

    Raises:
        UserError: at the first that is wrong, with the option as typed.

    >>> [str(each) for each in parse_space(["optimizer.lr=log(1e-4, 1e-1)", "plugins/clip=none,zscore"])]
    ['optimizer.lr=log(0.0001,0.1)', 'plugins/clip=choice(none,zscore)']
    """
    if not words:
        raise UserError(f"sweep: --over is needed: {_EXPECTED}")
    found = tuple(_dimension(word) for word in words)
    keys = [each.key for each in found]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UserError(f"sweep: --over: {twice} is given twice; give it once")
    return found


def _dimension(word: str) -> Dimension:
    key, sign, text = word.partition("=")
    key, text = key.strip().lstrip("+"), text.strip()
    if not sign or not key or not text:
        raise _wrong(word, _EXPECTED)
    call = _CALL.fullmatch(text)
    if call is None:
        return Dimension(key=key, kind="choice", choices=_choices(word, text))
    name = call["kind"]
    kind = _ALIASES.get(name, name)
    if kind not in get_args(Kind):
        raise _wrong(word, f"there is no {name}(){did_you_mean(name, get_args(Kind))}; {_EXPECTED}")
    if kind == "choice":
        return Dimension(key=key, kind="choice", choices=_choices(word, call["inside"]))
    low, high = _bounds(word, name, call["inside"])
    dimension = Dimension(key=key, kind=kind, low=low, high=high)  # type: ignore[arg-type]
    if dimension.is_log and low <= 0:
        raise _wrong(word, f"{name}() needs bounds above 0, got {low!r}; the logarithm of 0 is not finite")
    if dimension.is_whole and not (low.is_integer() and high.is_integer()):
        raise _wrong(word, f"{name}() needs whole numbers, got {low!r} and {high!r}")
    if low >= high:
        order = "equal" if low == high else "in the wrong order"
        raise _wrong(word, f"the bounds are {order}; expected a low one, then a higher one")
    return dimension


def _bounds(word: str, name: str, inside: str) -> tuple[float, float]:
    parts = [part.strip() for part in inside.split(",")]
    try:
        low, high = map(float, parts)
    except ValueError:
        raise _wrong(word, f"{name}() needs two numbers, got {inside!r}") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _wrong(word, f"{name}() needs finite bounds, got {inside!r}")
    return low, high


def _choices(word: str, text: str) -> tuple[str, ...]:
    choices = tuple(_split(text))
    if len(choices) < 2 or not all(choices):
        raise _wrong(word, f"expected at least two values, got {text!r}; {_EXPECTED}")
    if len(set(choices)) < len(choices):
        raise _wrong(word, "a value is given twice; give each once")
    return choices


def _split(text: str) -> Iterable[str]:
    """Split at commas, but not at those in brackets or quotes: ``[1,2],[3]`` are two values."""
    depth, quote, start = 0, "", 0
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def _wrong(word: str, what: str) -> UserError:
    return UserError(f"sweep: --over {word}: {what}")
