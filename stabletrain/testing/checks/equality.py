"""Equality to the last bit, where NaN equals NaN; and the search for non-finite numbers."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any


def same(one: Any, other: Any) -> bool:
    """Whether two values (numbers, texts, containers, tensors) are equal, bit for bit, with equal types."""
    return difference(one, other) is None


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two values differ, as a path with both values, or None.

    Args:
        one: numbers, texts, containers, tensors.
        other: the same.
        where: the path so far.
    """
    if one is other:
        return None
    torch = sys.modules.get("torch")  # a pure rule needs none
    if torch is not None and isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        if alike and (
            torch.equal(one, other) or (torch.equal(one.isnan(), other.isnan()) and _equal_but_nan(one, other))
        ):
            return None
        return f"{where or 'tensor'} differs"
    if type(one) is not type(other):
        return f"{where or 'value'}: {one!r} and {other!r}"
    if isinstance(one, Mapping):
        if set(one) != set(other):
            return f"{where or 'keys'}: only one has {sorted(map(str, set(one) ^ set(other)))}"
        return next((d for key in one if (d := difference(one[key], other[key], f"{where}.{key}"))), None)
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return f"{where or 'length'}: {len(one)} and {len(other)} items"
        pairs = enumerate(zip(one, other, strict=True))
        return next((d for i, (a, b) in pairs if (d := difference(a, b, f"{where}[{i}]"))), None)
    if isinstance(one, frozenset | set):
        return difference(sorted(one, key=repr), sorted(other, key=repr), where)
    if isinstance(one, float) and math.isnan(one) and math.isnan(other):
        return None
    return None if one == other else f"{where or 'value'}: {one!r} and {other!r}"


def nonfinite_numbers(value: Any, where: str = "") -> Iterator[str]:
    """Yield the path of every NaN and infinity in a value.

    Args:
        value: numbers, texts, containers, tensors.
        where: the path so far.
    """
    torch = sys.modules.get("torch")
    if isinstance(value, float):
        if not math.isfinite(value):
            yield f"{where or 'value'}={value}"
    elif torch is not None and isinstance(value, torch.Tensor):
        if value.is_floating_point() and not bool(value.isfinite().all()):
            yield f"{where or 'tensor'} is not finite"
    elif hasattr(value, "_fields"):
        for name in value._fields:
            yield from nonfinite_numbers(getattr(value, name), f"{where}.{name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from nonfinite_numbers(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from nonfinite_numbers(item, f"{where}[{index}]")


def _equal_but_nan(one: Any, other: Any) -> bool:
    known = ~one.isnan()
    return bool((one[known] == other[known]).all())
