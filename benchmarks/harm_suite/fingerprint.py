"""A fingerprint of a case: its own code and what it uses of harm_suite, without comments and docstrings."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from typing import Any

PACKAGE = __name__.split(".", 1)[0]


def fingerprint(make: Any) -> str:
    """Return 12 hexadecimal digits that change when the code of a case changes, and by nothing else.

    Functions, classes and constants of harm_suite that the code names are included, and what these name in turn. The
    protections, the judgement and the libraries are not.

    Args:
        make: the function of the case.
    """
    parts: dict[str, str] = {}
    _collect(make, parts)
    return hashlib.sha256("\n".join(parts[key] for key in sorted(parts)).encode()).hexdigest()[:12]


def _collect(item: Any, parts: dict[str, str]) -> None:
    key = f"{item.__module__}.{item.__qualname__}"
    if key in parts:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(item)))
    parts[key] = ast.unparse(_without_docstrings(tree))
    scope = vars(inspect.getmodule(item))
    for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
        found = scope.get(name)
        if inspect.isfunction(found) or inspect.isclass(found):
            if found.__module__.split(".", 1)[0] == PACKAGE:
                _collect(found, parts)
        elif isinstance(found, int | float | str | tuple):
            parts[f"{item.__module__}.{name}"] = repr(found)


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree
