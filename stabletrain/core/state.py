"""Conversion of rule states to plain Python and back, so that checkpoints load with ``weights_only=True``."""

from __future__ import annotations

import functools
import types
import typing
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
        ValueError: if ``plain`` does not have the fields of ``kind``.
    """
    return typing.cast(T, _restore(kind, plain))


def _restore(kind: Any, plain: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        if plain is None:
            return None
        kind = next(arg for arg in typing.get_args(kind) if arg is not type(None))
        return _restore(kind, plain)
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
    return plain


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)
