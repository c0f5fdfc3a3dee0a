"""Conversion of rule states to plain Python and back, so that checkpoints load with ``weights_only=True``."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_SCALARS = (type(None), bool, int, float, str)


def to_plain(state: Any) -> Any:
    """Convert a state (named tuples, tuples, numbers, strings, None) to dicts, lists and scalars.

    Raises:
        TypeError: if the state holds any other type.

    >>> from stabletrain.core.statistics import Ema
    >>> to_plain(Ema(mean=1.0, var=0.25))
    {'mean': 1.0, 'var': 0.25}
    """
    if hasattr(state, "_fields"):
        return {field: to_plain(getattr(state, field)) for field in state._fields}
    if isinstance(state, tuple):
        return [to_plain(item) for item in state]
    if type(state) in _SCALARS:  # no subclasses: torch.load(weights_only=True) refuses them
        return state
    raise TypeError(
        f"a rule's state may hold named tuples, tuples, numbers, strings and None, got {type(state).__name__}"
    )


def from_plain(kind: type[T], plain: Any) -> T:
    """The inverse of `to_plain`: build a state of type ``kind`` by the type hints of its fields.

    Raises:
        ValueError: if ``plain`` does not have the fields of ``kind``, or a value has another type than its field.

    >>> from stabletrain.core.statistics import Ema
    >>> from_plain(Ema, {"mean": "high", "var": 0.25})
    Traceback (most recent call last):
    ...
    ValueError: expected float, got 'high'
    """
    return typing.cast(T, _restore(kind, plain))


def _restore(kind: Any, plain: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _restore_any_of(typing.get_args(kind), plain)
    if origin is tuple:
        items = typing.get_args(kind)
        if not isinstance(plain, list | tuple):
            raise ValueError(f"{kind}: expected a list, got {type(plain).__name__}")
        if items[-1] is Ellipsis:
            items = items[:1] * len(plain)
        if len(items) != len(plain):
            raise ValueError(f"{kind}: expected {len(items)} items, got {len(plain)}")
        return tuple(_restore(item, each) for item, each in zip(items, plain, strict=True))
    if hasattr(kind, "_fields"):
        hints = _hints(kind)
        if not isinstance(plain, dict) or set(plain) != set(hints):
            found = sorted(plain) if isinstance(plain, dict) else type(plain).__name__
            raise ValueError(f"{kind.__name__}: expected the fields {sorted(hints)}, got {found}")
        return kind(**{field: _restore(hint, plain[field]) for field, hint in hints.items()})
    if origin in (Mapping, dict):
        if not isinstance(plain, dict):
            raise ValueError(f"{kind}: expected a dict, got {type(plain).__name__}")
        key_kind, item_kind = typing.get_args(kind)
        return {_restore(key_kind, key): _restore(item_kind, item) for key, item in plain.items()}
    if kind in _SCALARS and type(plain) is not kind and not (kind is float and type(plain) is int):
        raise ValueError(f"expected {kind.__name__}, got {plain!r:.60}")
    return plain


def _restore_any_of(kinds: tuple[Any, ...], plain: Any) -> Any:
    """The first of several kinds that fits; None fits only NoneType."""
    if plain is None and type(None) in kinds:
        return None
    *others, last = [kind for kind in kinds if kind is not type(None)]
    for kind in others:
        try:
            return _restore(kind, plain)
        except ValueError:
            continue
    return _restore(last, plain)


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
