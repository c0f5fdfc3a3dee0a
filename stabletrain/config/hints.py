"""Type hints as text, for messages."""

from __future__ import annotations

import types
import typing
from typing import Literal


def readable(hint: object) -> str:
    """Return a type hint as text for messages.

    Args:
        hint: a type hint.

    >>> readable(dict[str, int] | None)
    'dict[str, int] or None'
    """
    return " or ".join(_alternatives(hint))


def _alternatives(hint: object) -> list[str]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return list(dict.fromkeys(text for part in arguments for text in _alternatives(part)))
    if origin is Literal:
        return [repr(choice) for choice in arguments]
    if origin is typing.Annotated:
        return _alternatives(arguments[0])
    if hint is type(None):
        return ["None"]
    if isinstance(hint, type) and origin is None:
        return [hint.__name__]
    return [str(hint).replace("typing.", "").replace("collections.abc.", "")]
