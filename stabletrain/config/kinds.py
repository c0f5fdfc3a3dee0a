"""Which classes a place of the config accepts: a type hint for every place, and those of arguments.

`PLACES` gives the hint of every key that builds an object. An argument's hint is its annotation: where that says
what class belongs there, a config may build one of it; ``Any``, ``object``, no annotation, and classes of the standard
library say nothing, so that nothing may be built there.
"""

from __future__ import annotations

import importlib
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from stabletrain.config.annotations import alternatives

PLACES = {
    "model": "lightning.pytorch:LightningModule",
    "data": "lightning.pytorch:LightningDataModule",
    "optimizer": "torch.optim:Optimizer",
    "schedule": "lightning.pytorch:Callback",
    "precision": "lightning.pytorch:Callback",
    "strategy": "lightning.pytorch.strategies:Strategy",
    "plugins": "lightning.pytorch:Callback",
    "callbacks": "lightning.pytorch:Callback",
    "chaos": "lightning.pytorch:Callback",
    "logger": "lightning.pytorch.loggers:Logger",
}
"""First word of the key -> the base class of what is built there, imported when it is needed."""

TRAINER_PARTS = ("trainer", "precision", "strategy")
"""Keys that hold arguments of Lightning's Trainer; its annotations are their hints. ``precision`` may hold a callback
instead (`is_callback`), ``strategy`` a strategy (`is_node`)."""

_STANDARD_VALUES = frozenset({"datetime"})
"""Modules of the standard library whose classes are plain values, such as the timeout of a process group."""
_NAMES = {"Callback": "Lightning callback"}
_SEQUENCES = (list, tuple, set, frozenset)


def place_of(key: str) -> str:
    """Return the first word of a config key, or of an option as typed (``plugins/clip=norm``).

    >>> place_of("callbacks.early"), place_of("plugins/clip=norm")
    ('callbacks', 'plugins')
    """
    return re.split(r"[./=\[]", key, maxsplit=1)[0]


def is_node(part: str, node: object) -> bool:
    """Return whether one of `TRAINER_PARTS` is an object to build, and not arguments of the Trainer.

    Args:
        part: the key.
        node: the config there.
    """
    return part in ("precision", "strategy") and isinstance(node, Mapping) and "_target_" in node


def is_callback(part: str, node: object) -> bool:
    """Return whether one of `TRAINER_PARTS` is a callback to build.

    Args:
        part: the key.
        node: the config there.
    """
    return part == "precision" and is_node(part, node)


def place_hint(key: str) -> Any:
    """Return the hint of a place: its base class, or for the optimizer a callable that returns one.

    Args:
        key: a config key that begins with one of `PLACES`.
    """
    place = place_of(key)
    module, _, name = PLACES[place].partition(":")
    base = getattr(importlib.import_module(module), name)
    return Callable[..., base] if place == "optimizer" else base


def classes(hints: Iterable[Any]) -> tuple[type, ...]:
    """Return the classes of which an object may be built where these hints apply.

    Args:
        hints: from `alternatives`.
    """
    found = (typing.get_origin(hint) or hint for hint in hints)
    return tuple(each for each in found if isinstance(each, type) and not _says_nothing(each))


def returned_classes(hints: Iterable[Any]) -> tuple[type, ...]:
    """Return the classes of which a ``_partial_`` node may be built: those that a callable in the hints returns.

    Args:
        hints: from `alternatives`.
    """
    made = [typing.get_args(hint)[-1] for hint in hints if is_callable(hint) and typing.get_args(hint)]
    return classes(each for hint in made for each in alternatives(hint))


def item_hints(hints: Iterable[Any], index: int) -> list[Any]:
    """Return the hints of one item of a list.

    Args:
        hints: of the list.
        index: of the item.
    """
    found: list[Any] = []
    for hint in hints:
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if not isinstance(origin, type) or not inner or is_callable(hint):
            continue
        if origin is tuple and inner[-1] is not Ellipsis:
            found += alternatives(inner[index]) if index < len(inner) else []
        elif origin in _SEQUENCES or (origin.__module__ == "collections.abc" and len(inner) == 1):
            found += alternatives(inner[0])
    return found


def value_hints(hints: Iterable[Any]) -> list[Any]:
    """Return the hints of a mapping's values.

    Args:
        hints: of the mapping.
    """
    found: list[Any] = []
    for hint in hints:
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if isinstance(origin, type) and len(inner) == 2 and issubclass(origin, Mapping):
            found += alternatives(inner[1])
    return found


def described(found: Iterable[type]) -> str:
    """Return classes as text for messages.

    >>> described([dict, int])
    'dict or int'
    """
    return " or ".join(dict.fromkeys(_NAMES.get(each.__name__, each.__name__) for each in found))


def _says_nothing(found: type) -> bool:
    """Whether subclasses of a class may do anything: if it is of the standard library, as ``object``, or a protocol."""
    top = found.__module__.split(".")[0]
    effects = top in sys.stdlib_module_names and top not in _STANDARD_VALUES
    return effects or bool(getattr(found, "_is_protocol", False))


def is_callable(hint: Any) -> bool:
    """Return whether a hint says what a callable returns, as ``Callable[..., Optimizer]`` does."""
    return typing.get_origin(hint) is Callable
