"""Evaluate annotations one by one, including names that a module imports for type checkers only."""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import operator
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def argument_hints(target: Callable[..., Any]) -> dict[str, list[Any]]:
    """Return the hints of a callable's arguments, by name; ``*name`` for those passed by position without a name.

    An argument has several hints if its annotation is a union or the constructor has overloads, and none if the
    annotation is missing or cannot be evaluated.

    Args:
        target: a class or method.
    """
    found: dict[str, list[Any]] = {}
    for signature, names in _signatures(target):
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                continue
            label = f"*{name}" if parameter.kind is parameter.VAR_POSITIONAL else name
            hints = found.setdefault(label, [])
            if parameter.annotation is not parameter.empty:
                hints += alternatives(parameter.annotation, names)
    return found


def alternatives(hint: Any, names: Mapping[str, Any] | None = None) -> list[Any]:
    """Return the members of a hint that is a union, or the hint itself; those that cannot be evaluated are left out.

    Args:
        hint: a type hint, or the text of one.
        names: what the text may name: the globals of the module that it is written in.

    >>> alternatives("int | None", {})
    [<class 'int'>, <class 'NoneType'>]
    """
    names = names or {}
    if isinstance(hint, typing.ForwardRef):
        hint = hint.__forward_arg__
    for _ in range(2):  # where all annotations are texts, one in quotes is a text of a text
        if isinstance(hint, str):
            try:
                hint = eval(hint, dict(names), _ForCheckersOnly(names))
            except Exception:  # a name of a module that is not imported
                return []
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [each for part in typing.get_args(hint) for each in alternatives(part, names)]
    if typing.get_origin(hint) is typing.Annotated:
        return alternatives(typing.get_args(hint)[0], names)
    return [_with_inner_texts(hint, names)]


class _ForCheckersOnly(dict[str, Any]):
    """Names that the module of these globals imports below ``if TYPE_CHECKING``, if they are in memory anyway."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names

    def __missing__(self, name: str) -> Any:
        if name in self._names:
            raise KeyError(name)
        return _imported_for_checkers(str(self._names.get("__name__")))[name]


@functools.cache
def _imported_for_checkers(module: str) -> dict[str, Any]:
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
        package = sys.modules[module].__package__
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, Any] = {}
    for branch in ast.walk(tree):
        if not isinstance(branch, ast.If) or "TYPE_CHECKING" not in ast.unparse(branch.test):
            continue
        for statement in branch.body:
            if isinstance(statement, ast.ImportFrom):
                name = importlib.util.resolve_name("." * statement.level + (statement.module or ""), package)
                source = vars(sys.modules[name]) if name in sys.modules else {}
                found |= {
                    each.asname or each.name: source[each.name] for each in statement.names if each.name in source
                }
            elif isinstance(statement, ast.Import):
                for each in statement.names:
                    name = each.name if each.asname else each.name.split(".")[0]
                    if name in sys.modules:
                        found[each.asname or name] = sys.modules[name]
    return found


def _with_inner_texts(hint: Any, names: Mapping[str, Any]) -> Any:
    """Replace the texts inside a generic hint, such as ``list["Thing"]``, by what they name."""
    inner = typing.get_args(hint)
    if not any(isinstance(each, str | typing.ForwardRef) for each in inner) or typing.get_origin(hint) in (
        typing.Literal,
        Callable,
    ):
        return hint
    made = [functools.reduce(operator.or_, alternatives(each, names) or [Any]) for each in inner]
    try:
        return typing.get_origin(hint)[tuple(made)]
    except TypeError:
        return hint


def _signatures(target: Callable[..., Any]) -> Iterator[tuple[inspect.Signature, Mapping[str, Any]]]:
    """Yield the signatures of a callable's overloads and its own, each with the globals that its texts name."""
    function: Any = target
    if inspect.isclass(target) and "__signature__" not in vars(target):
        function = target.__init__ if target.__init__ is not object.__init__ else target.__new__
    for each in (*typing.get_overloads(inspect.unwrap(function)), function):
        try:
            signature = inspect.signature(each)
        except (TypeError, ValueError):
            continue
        parameters = list(signature.parameters.values())
        if function is not target and parameters:
            signature = signature.replace(parameters=parameters[1:])  # self
        yield signature, getattr(inspect.unwrap(each), "__globals__", {})
