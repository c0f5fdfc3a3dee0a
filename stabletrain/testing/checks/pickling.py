"""A plugin can be pickled and copied."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

from stabletrain.testing.checks.equality import difference
from stabletrain.testing.failure import wrong
from stabletrain.testing.subject import Subject, choice


def copies_are_equal(subject: Subject) -> None:
    """A pickle and a deep copy have the same class and the same arguments."""
    for option in subject.options:
        if "_target_" not in subject.node(option):
            continue
        original = subject.build(option)
        for how, copied in make_copies(original, choice(option)):
            if type(copied) is not type(original):
                wrong(f"{how} of {choice(option)} to be a {type(original).__name__}", type(copied).__name__)
            if found := difference(_arguments(original), _arguments(copied)):
                wrong(f"{how} of {choice(option)} to have the same arguments", found)


def make_copies(original: Any, case: str) -> list[tuple[str, Any]]:
    """Return a pickled and a deep copy, each with its name for messages.

    Args:
        original: the object to copy.
        case: its name for messages.
    """
    try:
        return [("a pickle", pickle.loads(pickle.dumps(original))), ("a deep copy", copy.deepcopy(original))]
    except Exception as error:
        wrong(f"{case} to be picklable and copyable", f"{type(error).__name__}: {error}")


def _arguments(plugin: Any) -> dict[str, Any]:
    """The constructor's arguments, as far as they are attributes of the same name."""
    if dataclasses.is_dataclass(plugin):
        return {field.name: getattr(plugin, field.name) for field in dataclasses.fields(plugin)}
    plain = (bool, int, float, str, tuple, list, type(None))
    named = {name: getattr(plugin, name, None) for name in inspect.signature(type(plugin)).parameters}
    return {name: value for name, value in named.items() if isinstance(value, plain)}
