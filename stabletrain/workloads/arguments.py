"""Checks of the arguments of modules and data modules."""

from __future__ import annotations

import math

from stabletrain.errors import UserError

MOST_WORKERS = 256
"""Processes of a data loader."""


def whole(key: str, value: object, least: int, most: int) -> None:
    """Raise an error unless an argument is an integer in a range.

    Args:
        key: its config key.
        value: as given.
        least: the smallest valid integer.
        most: the largest.

    Raises:
        UserError: unless it is valid; a bool is no integer.

    >>> whole("model.width", 0, 1, 65_536)
    Traceback (most recent call last):
    ...
    stabletrain.errors.UserError: model.width: expected a whole number from 1 to 65536, got 0
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{key}: expected a whole number from {least} to {most}, got {value!r}")


def number(key: str, value: object, least: float = 0.0, below: float = math.inf, *, above_least: bool = False) -> None:
    """Raise an error unless an argument is a number in a range.

    Args:
        key: its config key.
        value: as given.
        least: the smallest valid number.
        below: the smallest number that is too large.
        above_least: whether ``least`` itself is not valid.

    Raises:
        UserError: unless it is valid; NaN is not.

    >>> number("model.dropout", float("nan"), 0.0, 1.0)
    Traceback (most recent call last):
    ...
    stabletrain.errors.UserError: model.dropout: expected a number of at least 0 and below 1, got nan
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value < below or (above_least and value == least):  # type: ignore[operator]
        low = f"above {least:g}" if above_least else f"of at least {least:g}"
        high = "finite" if below == math.inf else f"below {below:g}"
        raise UserError(f"{key}: expected a number {low} and {high}, got {value!r}")
