"""A plugin that is given twice to one Trainer is one message, which says how to give it once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, overload

from stabletrain.errors import UserError


class GivenTwice(UserError, RuntimeError):
    """A plugin is given twice; a RuntimeError, too, as is Lightning's own error for two callbacks of one key."""


class given_once:
    """The property ``state_key`` of a callback; it raises `GivenTwice` where two in one Trainer have the same.

    ``Trainer(callbacks=...)`` compares the keys of its callbacks, and its own error names neither arguments nor
    ``default_callbacks``. So until the first ``setup`` or ``state_dict``, keys of two callbacks that are equal raise
    when compared. Afterwards the value is a plain str, so that none other gets into a checkpoint.

    Unlike of a ``property``, an attribute of the instance hides it: Lightning reads the key at every hook of every
    callback, so during a fit it is kept there.

    Args:
        state_key: the getter.
    """

    def __init__(self, state_key: Callable[[Any], str]) -> None:
        self._state_key = state_key
        self.__doc__ = state_key.__doc__

    @overload
    def __get__(self, callback: None, owner: type) -> given_once: ...

    @overload
    def __get__(self, callback: object, owner: type) -> str: ...

    def __get__(self, callback: object | None, owner: type) -> str | given_once:
        if callback is None:
            return self
        text = self._state_key(callback)
        reference = _attached.get(id(callback))
        return text if reference is not None and reference() is callback else _Key(text, callback)


def attach(callback: Any) -> None:
    """Note that a Trainer has called ``setup`` or ``state_dict``: from now on the callback's key is a plain str."""
    key = id(callback)
    _attached[key] = weakref.ref(callback, lambda _: _attached.pop(key, None))


_attached: dict[int, weakref.ref[Any]] = {}
"""By id: an attribute would change a callback that is only in ``Trainer.validate``, and a callback may have no hash."""


def check_slots(members: Sequence[Any]) -> None:
    """Raise an error if a plugin that ``default_callbacks`` chose by itself has company in its slot.

    Two plugins of a slot that the user has chosen are meant: their limits are joined.

    Args:
        members: the plugins of a Trainer.

    Raises:
        GivenTwice: with what to write instead.
    """
    for default in members:
        slot = getattr(default, "slot", None)
        if slot is None or not default.chosen_by_default:
            continue
        for other in members:
            if other is not default and getattr(other, "slot", None) == slot:
                mine, theirs = type(default).__name__, type(other).__name__
                raise GivenTwice(
                    f"Trainer(callbacks=...): default_callbacks() has chosen {mine} for the slot {slot}, and {theirs} "
                    f"is given, too; for one of them, write default_callbacks({slot}={theirs}(...)), for both "
                    f"default_callbacks({slot}={mine}()) beside {theirs}"
                )


class _Key(str):
    """A key that knows whose it is."""

    callback: Any

    def __new__(cls, text: str, callback: Any) -> _Key:
        key = super().__new__(cls, text)
        key.callback = callback
        return key

    def __eq__(self, other: object) -> bool:
        same = str.__eq__(self, other) is True
        if same and isinstance(other, _Key) and other.callback is not self.callback:
            raise GivenTwice(_message(self.callback, other.callback))
        return same

    __hash__ = str.__hash__

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (str(self),)


def _message(one: Any, other: Any) -> str:
    name = type(one).__name__
    if not (one.chosen_by_default or other.chosen_by_default):
        return f"Trainer(callbacks=...): {name} is given twice; remove one" + (
            f', or give one a unique name: {name}(..., name="second")' if hasattr(one, "name") else ""
        )
    slot = getattr(one, "slot", None)
    choice = "what you choose" if slot is None else f"{slot}={name}(...)"
    return (
        f"Trainer(callbacks=...): {name} is given twice, and default_callbacks() has chosen it already; pass yours to "
        f"it, default_callbacks({choice}), and not in the list"
    )
