"""Everything that a config can build: a walk over the built-in packages, from the places of the config inwards.

``python tests/helpers/reach.py > tests/config/accepted_classes.txt`` accepts what is new.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import pkgutil
import typing
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from stabletrain.config import kinds
from stabletrain.config.annotations import alternatives, argument_hints
from stabletrain.config.trust import BUILT_IN, EFFECTS, is_a, resolve
from stabletrain.errors import UserError


def modules(package: str) -> Iterator[Any]:
    """The public modules of a package that can be imported here."""
    if package in EFFECTS or package.rsplit(".", 1)[-1].startswith(("_", "test_", "libbitsandbytes")):
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module = importlib.import_module(package)
    except BaseException:  # optional packages that are not installed
        return
    yield module
    for inner in pkgutil.iter_modules(getattr(module, "__path__", []), f"{package}."):
        yield from modules(inner.name)


def callables() -> dict[int, tuple[str, Any]]:
    """Every callable of the built-in packages, once, by the shortest name that leads to it."""
    found: dict[int, tuple[str, Any]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in [each for package in sorted(BUILT_IN) for each in modules(package)]:
            for name in dir(module):
                if name.startswith("_"):
                    continue
                value = getattr(module, name, None)
                target = f"{module.__name__}.{name}"
                if callable(value) and len(target) < len(found.get(id(value), (target + " ",))[0]):
                    found[id(value)] = (target, value)
    return found


def methods(target: str, owner: type) -> Iterator[str]:
    """The public methods of a class, class methods and static methods among them."""
    for name in dir(owner):
        if not name.startswith("_"):
            with contextlib.suppress(Exception):
                value = getattr(owner, name)
                if callable(value):
                    yield f"{target}.{name}"


def accepted(bases: set[type], among: dict[int, tuple[str, Any]]) -> dict[type, dict[str, Any]]:
    """What can be built: base class -> name -> class or preset, for these bases and all that arguments ask for."""
    found: dict[type, dict[str, Any]] = {}
    left = set(bases)
    while left:
        base = left.pop()
        found[base] = {}
        for target, value in among.values():
            if isinstance(value, type) and not is_a(value, [base]):
                continue
            for name in [target, *(methods(target, value) if isinstance(value, type) else ())]:
                try:
                    made = resolve(name, [base])
                except UserError:
                    continue
                found[base][name] = made
                left |= {inner for inner in asked_for(made) if inner not in found}
    return found


def places() -> set[type]:
    """The base classes of the config's places, and those that the Trainer's arguments ask for."""
    from lightning.pytorch import Trainer

    hints = [kinds.place_hint(place) for place in kinds.PLACES]
    return {*kinds.classes(hints), *kinds.returned_classes(hints), *asked_for(Trainer)}


def report(found: dict[type, dict[str, Any]]) -> str:
    """What can be built, as text: the base class, then its classes by name."""
    lines = []
    for base in sorted(found, key=lambda each: f"{each.__module__}.{each.__qualname__}"):
        if names := sorted(found[base]):
            lines += [f"{base.__module__}.{base.__qualname__}", *(f"    {name}" for name in names)]
    return "\n".join(lines) + "\n"


def asked_for(target: Callable[..., Any]) -> set[type]:
    """The classes of which an argument takes an object, at any depth of lists and mappings."""
    left = [hint for hints in argument_hints(target).values() for hint in hints]
    found: set[type] = set()
    for hint in left:
        found |= {*kinds.classes([hint]), *kinds.returned_classes([hint])}
        if inspect.isclass(typing.get_origin(hint)) and not kinds.is_callable(hint):
            left += [each for inner in typing.get_args(hint) if inner is not ... for each in alternatives(inner)]
    return found


if __name__ == "__main__":
    print(report(accepted(places(), callables())), end="")
