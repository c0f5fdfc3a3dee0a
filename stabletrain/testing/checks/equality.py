"""Equality to the last bit, where NaN equals NaN and -0.0 differs from 0.0; and the search for non-finite numbers."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any


def same(one: Any, other: Any) -> bool:
    """Whether two values (numbers, texts, containers, tensors, arrays) are equal, bit for bit, with equal types."""
    return difference(one, other) is None


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """The first of the `differences`, or None if there is none."""
    return next(differences(one, other, where), None)


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Yield every position at which two values differ, as a path with both values.

    Tensors and arrays are compared by dtype, shape and bits: a NaN equals only a NaN of the same bits. Of Python floats
    all NaN are equal, since text and JSON have only one. Sets are compared in the order of their items' ``repr``.

    Args:
        one: numbers, texts, containers, tensors, arrays.
        other: the same.
        where: the path so far.
    """
    if one is other:
        return
    if type(one) is not type(other):
        yield f"{where or 'value'}: {_short(one)} and {_short(other)}"
    elif _is_tensor(one):
        if not _same_tensors(one, other):
            yield f"{where or 'tensor'} differs"
    elif _is_array(one):
        alike = one.dtype == other.dtype and one.shape == other.shape
        if alike and one.dtype.hasobject:
            yield from differences(one.tolist(), other.tolist(), where)  # their bytes are addresses of objects
        elif not alike or one.tobytes() != other.tobytes():
            yield f"{where or 'array'} differs"
    elif isinstance(one, Mapping):
        for key in sorted({*one, *other}, key=str):
            if key in one and key in other:
                yield from differences(one[key], other[key], f"{where}.{key}")
            else:
                yield f"{where}.{key}: only in {'one' if key in one else 'other'}"
    elif isinstance(one, list | tuple | deque):
        if len(one) != len(other):
            yield f"{where or 'length'}: {len(one)} and {len(other)} items"
        for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
            yield from differences(mine, theirs, f"{where}[{index}]")
        if isinstance(one, deque) and one.maxlen != other.maxlen:
            yield f"{where or 'deque'}: maximal length {one.maxlen} and {other.maxlen}"
    elif isinstance(one, frozenset | set):
        yield from differences(sorted(one, key=repr), sorted(other, key=repr), where)
    elif isinstance(one, float | complex):
        if not _same_numbers(one, other):
            yield f"{where or 'value'}: {one!r} and {other!r}"
    elif one != other:
        yield f"{where or 'value'}: {one!r} and {other!r}"


def nonfinite_numbers(value: Any, where: str = "") -> Iterator[str]:
    """Yield the path of every NaN and infinity in a value.

    Args:
        value: numbers, texts, containers, tensors.
        where: the path so far.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            yield f"{where or 'value'}={value}"
    elif _is_tensor(value):
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


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # a pure rule needs none: it is not imported here
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _same_tensors(one: Any, other: Any) -> bool:
    torch = sys.modules["torch"]
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    mine, theirs = (
        each.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)
        for each in (one, other)
    )
    return bool(torch.equal(mine, theirs))


def _same_numbers(one: Any, other: Any) -> bool:
    """Floats, or complex numbers part by part: NaN equals NaN, and -0.0 differs from 0.0."""
    parts = [(one.real, other.real), (one.imag, other.imag)]
    return all(repr(float(mine)) == repr(float(theirs)) for mine, theirs in parts)


def _short(value: Any) -> str:
    text = f"{type(value).__name__} {value!r}"
    return text if len(text) <= 80 else f"{text[:77]}..."
