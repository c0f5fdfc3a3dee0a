"""Attributes of modules that hold tensors: each with its value as it was at the start of an accumulation window."""

from __future__ import annotations

from typing import Any

from torch import nn

from stabletrain.runtime.hidden.contents import holds_tensors, is_container
from stabletrain.runtime.hidden.values import Saved, Uncopied

MISSING: Any = object()
UNKNOWN: Any = object()
"""Instead of a value before there were tensors: there were some from the beginning."""


class Owner:
    """The attributes of one module.

    Args:
        prefix: of the attributes' paths: the module's name and a dot.
        module: the module.
        names: its attributes, or its buffers: the dictionary itself.
        ignored: names of those that are no state of its own.
    """

    def __init__(self, prefix: str, module: nn.Module, names: dict[str, Any], ignored: frozenset[str]) -> None:
        self.prefix, self.module, self.names, self.ignored = prefix, module, names, ignored
        self.was_examined = False
        self.ids: list[int] = []
        """Of all values when they were last examined."""
        self.others: dict[str, Any] = {}
        """The values without tensors then; while they are kept, no other value can have one of their ids."""


class Slot:
    """One attribute that holds tensors, or has held them, or is a container to which they may be added."""

    def __init__(self, owner: Owner, key: str, before: Any) -> None:
        self.owner, self.key, self.path = owner, key, f"{owner.prefix}{key}"
        self.saved: Saved | None = None  # None: it held no tensors, and no containers to which some may be added
        self.held = False  # tensors
        self.plain = before  # its value without tensors
        self.length = 0  # of a container without tensors
        self.first = before
        self.changes = 0  # since it was found; tensors that are made once, such as a mask, change once
        self.changed = self.in_place = self.uncopied = False

    @property
    def value(self) -> Any:
        """The value now; `MISSING` if the attribute is gone."""
        return self.owner.names.get(self.key, MISSING)

    @property
    def is_current(self) -> bool:
        """Whether the value is that of the last copy."""
        value = self.value
        if self.saved is not None:
            return self.saved.is_current(value)
        return value is self.plain and (not is_container(value) or len(value) == self.length)

    @property
    def has_only_grown(self) -> bool:
        """Whether it is a list to which items were added."""
        value = self.value
        if self.saved is not None:
            return self.saved.is_beginning_of(value)
        return value is self.plain and isinstance(value, list) and len(value) > self.length

    def put(self, value: Any) -> None:
        """Set the attribute; a container that is there keeps its identity."""
        module, names, live = self.owner.module, self.owner.names, self.value
        if value is live:
            return
        if is_container(value) and type(live) is type(value):
            live.clear()
            live.update(value) if isinstance(value, dict) else live.extend(value)
        elif value is MISSING:
            names.pop(self.key, None)
        elif names is module._buffers or not any(
            self.key in each for each in (module._parameters, module._buffers, module._modules)
        ):
            names[self.key] = value

    def put_back(self) -> None:
        """Put back the value of the last copy; a list that held no tensors loses those that were added since."""
        value = self.value
        if not (self.held or holds_tensors(value)):
            return
        if self.saved is not None:
            try:
                self.put(self.saved.restored(value))
            except Uncopied:
                return
        elif value is self.plain and is_container(value):
            while len(value) > self.length:  # what was added last is at the end
                value.popitem() if isinstance(value, dict) else value.pop()
        else:
            self.put(self.plain)
