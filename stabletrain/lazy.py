"""Packages whose public names are loaded on first use, so that importing the package loads nothing heavy."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package (PEP 562).

    Args:
        package: name of the package.
        modules: public name -> module of the package that defines it.

    >>> lazy_exports("stabletrain.core", {"Window": "statistics"})("Window")().values
    ()
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; expected one of {', '.join(modules)}")
        return getattr(importlib.import_module(f"{package}.{modules[name]}"), name)

    return load
