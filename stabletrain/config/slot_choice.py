"""What a script gives for a slot of ``default_callbacks``: the name of an option, a callback, or None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stabletrain.config import trust
from stabletrain.config.discovery import SLOTS, Option, content
from stabletrain.config.problems import suggestion
from stabletrain.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Callback

Groups = Mapping[str, Mapping[str, Option]]


def check_choice(slot: str, choice: object, groups: Groups) -> None:
    """Raise an error unless the choice is an option of the slot, a callback that belongs to it, or None.

    Args:
        slot: such as ``clip``, or ``schedule``.
        choice: as given by the user.
        groups: all config groups with their options.

    Raises:
        UserError: for anything else; the message says where it belongs.
    """
    from lightning.pytorch import Callback

    options = groups[group_of(slot, groups)]
    if choice is None:
        return
    if isinstance(choice, str):
        if choice not in options:
            raise UserError(f"default_callbacks: {slot} has no option {choice!r}{suggestion(choice, options)}")
        return
    what = f"default_callbacks: {slot}: expected "
    if isinstance(choice, type) and issubclass(choice, Callback):
        raise UserError(f"{what}a callback, got the class {choice.__name__}; call it: {slot}={choice.__name__}(...)")
    if not isinstance(choice, Callback):
        names = ", ".join(repr(name) for name in options)
        raise UserError(f"{what}one of {names}, a callback, or None; got {choice!r}")
    if _belongs(choice, slot, groups):
        return
    name = type(choice).__name__
    others = [other for other in _slots(groups) if _belongs(choice, other, groups)]
    if others:
        raise UserError(
            f"{what}a plugin of this slot, got {name} of the slot {others[0]}; write {others[0]}={name}(...)"
        )
    raise UserError(
        f"{what}a plugin of this slot, got {name}, which belongs to no slot; add it to the list: "
        f"[*default_callbacks(), {name}(...)]"
    )


def is_slot(group: str) -> bool:
    """Return whether the options of a config group are callbacks of which a run has at most one."""
    return group.startswith(f"{SLOTS}/") or group == "schedule"


def group_of(slot: str, groups: Groups) -> str:
    """Return the config group of a slot, such as ``plugins/clip`` of ``clip``; ``schedule`` is its own group."""
    return f"{SLOTS}/{slot}" if f"{SLOTS}/{slot}" in groups else slot


def _slots(groups: Groups) -> list[str]:
    return [group.removeprefix(f"{SLOTS}/") for group in groups if is_slot(group)]


def _belongs(callback: Callback, slot: str, groups: Groups) -> bool:
    """Whether a callback names the slot as its own, or is of a class that an option of the slot builds."""
    if isinstance(named := getattr(callback, "slot", None), str):
        return named == slot
    classes = (_class_of(option) for option in groups[group_of(slot, groups)].values())
    return any(isinstance(callback, each) for each in classes if each is not None)


def _class_of(option: Option) -> type | None:
    from lightning.pytorch import Callback

    target = content(option).get("_target_")
    if target is None:
        return None
    found = trust.resolve(target, [Callback])
    owner = getattr(found, "__self__", found)  # a preset, such as ClipZScore.zclip, is a class method
    return owner if isinstance(owner, type) else None
