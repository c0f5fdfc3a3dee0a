"""Lightning Fabric accepts any object as a callback and calls none of a Trainer's hooks: plugins are refused there."""

from __future__ import annotations

import functools
import sys
from typing import Any, TypeVar

from stabletrain.errors import UserError

_PACKAGES = ("lightning.fabric.fabric", "lightning_fabric.fabric")
_KINDS: list[type] = []

T = TypeVar("T", bound=type)


def refuse_in_fabric(kind: T) -> T:
    """Class decorator: ``Fabric(callbacks=...)`` with an instance of the class raises a `UserError`."""
    _KINDS.append(kind)
    for name in _PACKAGES:
        module = sys.modules.get(name)
        if module is not None and not hasattr(module.Fabric._configure_callbacks, "__wrapped__"):
            _wrap(module.Fabric)
    return kind


def _wrap(fabric: Any) -> None:
    inner = fabric._configure_callbacks

    @functools.wraps(inner)
    def configure_callbacks(callbacks: Any) -> Any:
        given = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
        names = [type(each).__name__ for each in given if isinstance(each, tuple(_KINDS))]
        if names:
            raise UserError(
                f"Fabric(callbacks=...): expected callbacks for Fabric, got {', '.join(names)} of stabletrain, which "
                "work in a Lightning Trainer only: Fabric calls none of their hooks. Train with "
                "Trainer(callbacks=[...]), or remove them"
            )
        return inner(callbacks)

    fabric._configure_callbacks = staticmethod(configure_callbacks)
