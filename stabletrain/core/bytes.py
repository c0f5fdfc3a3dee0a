"""Amounts of memory, as text; see `stabletrain.core.lengths` for the family of parsers."""

from __future__ import annotations

import math

from stabletrain.core.lengths import number_and_unit
from stabletrain.errors import UserError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
FORMS = "an amount of memory like '8GB' or '500MiB'"
"""The forms of an amount of memory, for messages."""


def parse(value: str, *, name: str = "amount of memory") -> float:
    """Read an amount of memory; return it in bytes.

    Args:
        value: a number and a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024), in any
            case.
        name: the config key, for messages.

    Raises:
        UserError: if the value has no such form.

    >>> parse("8GB"), parse("0.5 MiB")
    (8000000000.0, 524288.0)
    """
    found = number_and_unit(value.upper(), _UNITS) if isinstance(value, str) else None
    if found is None or not math.isfinite(found[0]) or found[0] < 0:
        raise UserError(f"{name}: expected {FORMS}, got {value!r}")
    number, unit = found
    return float(number) * _UNITS[unit]


def shown(amount: float) -> str:
    """Return an amount of memory as text.

    Args:
        amount: in bytes.

    >>> shown(8.04e9), shown(512)
    ('8.04 GB', '512 B')
    """
    for unit in ("TB", "GB", "MB", "KB"):
        if amount >= _UNITS[unit]:
            return f"{amount / _UNITS[unit]:.3g} {unit}"
    return f"{amount:.0f} B"
