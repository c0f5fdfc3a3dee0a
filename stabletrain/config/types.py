"""Check values from YAML against type hints."""

from __future__ import annotations

import inspect
import typing
from datetime import timedelta
from typing import Any, Literal, cast

from pydantic import (
    ConfigDict,
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    TypeAdapter,
    ValidationError,
)

from stabletrain.config.hints import readable
from stabletrain.config.problems import suggestion

_ANY = (Any, object, inspect.Parameter.empty)


def mismatch(value: object, hint: object) -> str | None:
    """Return what is wrong with a value; None if it matches the type hint, or the hint cannot be evaluated.

    YAML has fewer types than Python: a list may stand for a tuple, an integer for a float, a string for a path or an
    enumeration. A string never matches a number, since the callable would receive a string.

    Args:
        value: a plain value: mapping, list, string, number, bool or None.
        hint: a type hint.

    >>> mismatch(3, int | None) is None
    True
    >>> mismatch("three", int | None)
    "expected int or None, got 'three' (str)"
    >>> mismatch("linaer", Literal["linear", "log"])
    "expected 'linear' or 'log', got 'linaer' (str); did you mean 'linear'?"
    """
    if hint in _ANY or isinstance(hint, str | typing.TypeVar):
        return None
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(cast(Any, hint), config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation, TypeError, NameError):
        return None
    except Exception as error:
        if type(error).__module__.startswith("pydantic"):
            return None
        raise
    try:
        result = adapter.validate_python(value)
    except ValidationError:
        return _message(value, hint)
    coerced = (
        isinstance(value, str | bool | float) and isinstance(result, int | float) and type(result) is not type(value)
    )
    coerced = coerced or (isinstance(result, timedelta) and not isinstance(value, timedelta))
    coerced = coerced or (isinstance(value, int) and isinstance(result, bool) and not isinstance(value, bool))
    return _message(value, hint) if coerced else None


def _choices(hint: object) -> list[str]:
    if typing.get_origin(hint) is Literal:
        return [choice for choice in typing.get_args(hint) if isinstance(choice, str)]
    return [choice for part in typing.get_args(hint) for choice in _choices(part)]


def _message(value: object, hint: object) -> str:
    near = suggestion(value, _choices(hint), list_all=False) if isinstance(value, str) else ""
    return f"expected {readable(hint)}, got {value!r} ({type(value).__name__}){near}"
