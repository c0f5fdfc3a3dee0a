"""JSON that somebody else may have written: parsed within bounds, every field checked for its type and range."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from stabletrain.runtime.checkpoints.errors import CheckpointError

VALUES_LIMIT = 20_000_000
"""Largest number of values in a file: Python needs up to about 70 bytes of memory for each."""
INT_LIMIT = 2**62
"""Counts and sizes are smaller than this."""


def parse(raw: bytes, name: str) -> Any:
    """Parse JSON. NaN and infinity are refused; nesting beyond Python's recursion limit too.

    Args:
        raw: the text.
        name: of the file, for errors.

    Raises:
        CheckpointError: if it is not JSON, or holds too many values.
    """
    require_few_values(raw, name)
    try:
        return json.loads(raw, parse_constant=_refuse)
    except RecursionError:
        raise CheckpointError(f"{name} is nested too deeply") from None
    except ValueError:
        raise CheckpointError(f"{name} is not valid JSON") from None


def require_few_values(raw: bytes, name: str) -> None:
    """Raise a `CheckpointError` for JSON with more than `VALUES_LIMIT` values: when it is written, and when it is read.

    Args:
        raw: the text; the commas in its strings count, too.
        name: for the error.
    """
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > VALUES_LIMIT:
        raise CheckpointError(
            f"{name} holds more than {VALUES_LIMIT} values besides tensors: keep large lists of numbers as tensors"
        )


class Fields:
    """The fields of a JSON object, each read with the type and range that it must have.

    Args:
        value: the object.
        name: where it is, for errors, such as ``manifest.json``.

    Raises:
        CheckpointError: here if ``value`` is not an object; in the methods if the field is missing or does not fit.

    >>> fields = Fields({"step": 3, "run": None}, "manifest.json")
    >>> fields.integer("step"), fields.text("run", optional=True)
    (3, None)
    >>> fields.text("step")
    Traceback (most recent call last):
    ...
    stabletrain.runtime.checkpoints.errors.CheckpointError: manifest.json: step must be text, got 3
    """

    def __init__(self, value: Any, name: str) -> None:
        if not isinstance(value, dict):
            raise CheckpointError(f"{name}: expected an object, got {shown(value)}")
        self._value: Mapping[str, Any] = value
        self._name = name

    def integer(self, field: str, low: int = 0, default: int | None = None) -> int:
        """An integer from ``low`` to `INT_LIMIT`; a default makes the field optional."""
        found: Any = self._get(field) if default is None else self._get(field, default)
        if type(found) is not int or not low <= found < INT_LIMIT:
            self._fail(field, f"an integer >= {low}", found)
        return found

    def text(self, field: str, limit: int = 1000, optional: bool = False) -> Any:
        """Text of at most ``limit`` characters; if it is optional, None if it is missing or null."""
        found = self._get(field, None) if optional else self._get(field)
        if not (found is None and optional) and (not isinstance(found, str) or len(found) > limit):
            self._fail(field, "text" if not isinstance(found, str) else f"at most {limit} characters", found)
        return found

    def number(self, field: str) -> float | None:
        """A finite number; None if it is missing or null."""
        found: Any = self._get(field, None)
        if found is None:
            return None
        if type(found) not in (int, float) or not abs(found) <= sys.float_info.max:
            self._fail(field, "a finite number or null", found)
        return float(found)

    def boolean(self, field: str, default: bool) -> bool:
        """True or false; the default if it is missing."""
        found: Any = self._get(field, default)
        if type(found) is not bool:
            self._fail(field, "true or false", found)
        return found

    def nested(self, field: str, optional: bool = False) -> Fields:
        """An object; if it is optional, an empty one if it is missing."""
        return Fields(self._get(field, {}) if optional else self._get(field), f"{self._name}: {field}")

    def items(self, limit: int = 1000) -> list[str]:
        """The names of all fields, of which there are at most ``limit``."""
        if len(self._value) > limit:
            raise CheckpointError(f"{self._name}: expected at most {limit} entries, got {len(self._value)}")
        return list(self._value)

    def _get(self, field: str, *default: Any) -> Any:
        if field not in self._value and not default:
            raise CheckpointError(f"{self._name}: {field} is missing")
        return self._value.get(field, *default)

    def _fail(self, field: str, expected: str, got: Any) -> NoReturn:
        raise CheckpointError(f"{self._name}: {field} must be {expected}, got {shown(got)}")


def shown(value: Any) -> str:
    """A value in an error: containers by their kind, long texts shortened."""
    if isinstance(value, str | int | float | bool | None):
        try:
            text = json.dumps(value)
        except ValueError:  # an integer with too many digits
            text = "a number of many digits"
        return text if len(text) <= 60 else text[:60] + "..."
    kinds: dict[type, str] = {dict: "an object", list: "a list"}
    return kinds.get(type(value), type(value).__name__)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)
