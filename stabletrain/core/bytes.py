"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)


def parse(text: str) -> float | None:
    """An amount of memory in bytes; None if it is not understood.

    >>> parse("8GB"), parse("0.5 MiB"), parse("8")
    (8000000000.0, 524288.0, None)
    """
    match = _MEMORY.fullmatch(text)
    return float(match[1]) * _UNITS[match[2].upper()] if match and match[2].upper() in _UNITS else None


def shown(amount: float) -> str:
    """An amount of memory for people.

    >>> shown(8.04e9), shown(512)
    ('8.04 GB', '512 B')
    """
    for unit in ("TB", "GB", "MB", "KB"):
        if amount >= _UNITS[unit]:
            return f"{amount / _UNITS[unit]:.3g} {unit}"
    return f"{amount:.0f} B"
