"""Tensors in plain attributes of modules, such as the hidden state of an LSTM, kept and put back as buffers are.

They are found without the module's help: in the attributes of the module and its submodules, also within tuples, lists
and dictionaries. What torch, Lightning and torchmetrics keep in attributes is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.runtime.hidden.contents import holds_tensors, is_container, is_data, may_hold_later
from stabletrain.runtime.hidden.opaque_state import OpaqueState
from stabletrain.runtime.hidden.slots import MISSING, UNKNOWN, Owner, Slot
from stabletrain.runtime.hidden.values import Saved, Uncopied
from stabletrain.runtime.internals import attributes

_LIMIT = 64 << 20
"""Bytes of all copies together that are always kept; more, if half of the parameters is more."""
_LARGE, _CONSTANT_AFTER = 1 << 20, 16
"""A tensor of more bytes that has not changed in the first windows is not copied any longer."""
_SHORT = 64
"""Items of a container without tensors that is copied when it is found."""
_LOOKS = (1, 2, 8, 32)
"""Windows at whose start objects that cannot be kept are looked at."""


class HiddenState:
    """Finds the tensors in a module's attributes, and copies those that change, at the start of accumulation windows.

    A value has changed if it is another object, or if its version counter has increased (as in `ModuleBuffers`). The
    copies take no more memory than half of the parameters, or 64 MiB.

    Args:
        module: the module that is trained.
        copies: whether to copy; False: only find what changes after the first `stash`.
        buffers: also find the buffers that ``state_dict`` leaves out.
    """

    def __init__(self, module: nn.Module, copies: bool = True, buffers: bool = False) -> None:
        self._copies = copies
        self._slots: dict[str, Slot] = {}
        self._told: set[str] = set()
        self._windows = self._bytes = 0
        self._may_have_news = False
        self._limit = max(_LIMIT, sum(p.numel() * p.element_size() for p in module.parameters()) // 2)
        self._opaque = OpaqueState()
        self._registered = {} if buffers else {id(each): each for each in module.buffers()}
        self._owners: list[Owner] = []
        self._library: list[tuple[Owner, int]] = []  # classes of torch: watched from when something is added
        for name, child in attributes.attribute_owners(module):
            names, ignored = attributes.names_of(child), attributes.ignored_attributes(child)
            owner = Owner(f"{name}." if name else "", child, names, ignored)
            if attributes.is_of_library(child) and not any(
                holds_tensors(value) for key, value in names.items() if key not in ignored
            ):
                self._library.append((owner, len(names)))
            else:
                self._owners.append(owner)
            if buffers and (kept := attributes.buffers_not_saved(child)):
                left_out = frozenset(attributes.names_within(child._buffers)) - kept
                self._owners.append(Owner(owner.prefix, child, child._buffers, left_out))

    # ---- accumulation windows ---------------------------------------------------------------------------------------

    def stash(self, modules: Collection[nn.Module] | None = None) -> None:
        """Copy what has changed since the last call.

        Args:
            modules: those whose attributes are copied; of others the last copies stay. None: all.
        """
        self._windows += 1
        self._find(modules)
        for slot in self._slots.values():
            if (modules is None or slot.owner.module in modules) and not slot.is_current:
                self._save(slot)
        if self._windows == _CONSTANT_AFTER:
            self._drop_constants()
        if self._windows in _LOOKS:
            self._opaque.look(self._unkept())
            self._may_have_news = True

    def restore(self) -> None:
        """Put everything back as it was at the last `stash`."""
        self._find(())
        for slot in self._slots.values():
            if not slot.is_current:
                slot.put_back()

    def restore_where(self, dropped: Tensor) -> None:
        """As `restore` where ``dropped`` is 1, decided on the device.

        Where a value has come or gone, or has another shape, the host waits for the device; not for a list that has
        only become longer, which stays.
        """
        self._find(())
        others = []
        for slot in self._slots.values():
            if not slot.is_current and not slot.has_only_grown:
                value = slot.value
                if slot.saved is None or not slot.saved.restore_where(value, dropped):
                    others.append(slot)
        others = [slot for slot in others if slot.held or holds_tensors(slot.value)]
        if others and bool(dropped):
            for slot in others:
                slot.put_back()

    def news(self) -> list[str]:
        """What the user should know and was not told yet: which attributes are kept, and which cannot be."""
        if not self._may_have_news:  # asked at every step
            return []
        self._may_have_news = False
        told = (slot for slot in self._slots.values() if slot.changes > 1 or (slot.changed and slot.uncopied))
        paths = [slot.path for slot in told if slot.path not in self._told]
        self._told.update(paths)
        lost = [path for path in paths if self._slots[path].uncopied]
        kept = [path for path in paths if path not in lost]
        messages = []
        if kept:
            messages.append(
                f"hidden state: training changes the tensors in the attribute{'s' * (len(kept) > 1)} "
                f"{_listed(kept)}, which no state_dict contains. They are kept as buffers are: put back after a "
                "dropped step and by a rollback, and saved by an exact checkpoint"
            )
        if lost:
            messages.append(
                f"hidden state: {_listed(lost)} cannot be kept, because {_LIMIT >> 20} MiB and half of the parameters "
                "are less than a copy needs: a dropped step or a rollback leaves it as it is. If the next batch reads "
                "it, register it as a buffer; if nothing does, this does no harm"
            )
        if objects := self._opaque.news():
            messages.append(
                f"hidden state: {_listed(objects)} cannot be kept, because only tensors, and tuples, lists and "
                "dictionaries of them, are: a dropped step, a rollback or a resume leaves it as it is. Keep its "
                "tensors in attributes or buffers of the module, or define snapshot_state and restore_state for "
                "rollbacks"
            )
        return messages

    # ---- snapshots and checkpoints ----------------------------------------------------------------------------------

    def values(self, changed: bool = False) -> dict[str, Any]:
        """The values now, by path, not copied; without those that are no data, and large ones that never changed.

        Args:
            changed: only those that have changed since the first `stash`.
        """
        self._find(None if self._copies else ())
        found = {}
        for slot in self._slots.values():
            value = slot.value
            if not slot.is_current:
                slot.changed |= slot.held or holds_tensors(value)
                self._may_have_news = True
            small = slot.held and slot.saved is not None and slot.saved.nbytes <= _LARGE
            is_empty = is_container(value) and not value
            if value is not MISSING and is_data(value) and (slot.changed or (not changed and (small or is_empty))):
                found[slot.path] = value
        return found

    def put(self, values: Mapping[str, Any]) -> list[str]:
        """Set attributes to values of `values`; those that held no tensors then get their values before.

        Returns:
            The paths that the module does not have.
        """
        self._find(None if self._copies else ())
        for slot in self._slots.values():
            if slot.path not in values and slot.changed and slot.first is not UNKNOWN:
                slot.put(slot.first)
        owners: dict[str, list[Owner]] = {}
        for owner in (*self._owners, *(each for each, _ in self._library)):
            owners.setdefault(owner.prefix, []).append(owner)
        unknown: list[str] = []
        for path, value in values.items():
            prefix, _, key = path.rpartition(".")
            known = self._slots.get(path)
            if is_container(value) and not value and (known is None or not holds_tensors(known.value)):
                continue  # a list of other values is not restored
            if known is None:
                found = owners.get(f"{prefix}." if prefix else "", [])
                if not found or hasattr(type(found[0].module), key):  # a method, say
                    unknown.append(path)
                    continue
                owner = next((each for each in found if key in each.names), found[0])
                known = self._slots[path] = Slot(owner, key, owner.names.get(key, MISSING))
            known.changed = self._may_have_news = True
            known.put(value)
        return unknown

    def in_place(self, path: str) -> bool:
        """Whether the tensors of an attribute were changed in place: other tensors may share their memory."""
        return self._slots[path].in_place if path in self._slots else False

    # ---- finding and copying ----------------------------------------------------------------------------------------

    def _find(self, modules: Collection[nn.Module] | None) -> None:
        """Find attributes that hold tensors now and did not at the last `stash`.

        Args:
            modules: those at whose windows' start this is: what is found there is copied. None: all.
        """
        for each in [each for each in self._library if len(each[0].names) != each[1]]:
            self._library.remove(each)
            each[0].was_examined = True  # it had no tensors: those that are found now came since
            self._owners.append(each[0])
        for owner in self._owners:
            names = owner.names
            if [*map(id, names.values())] == owner.ids:
                continue
            within = modules is not None and owner.module not in modules
            for key, value in names.items():
                path = f"{owner.prefix}{key}"
                if key in owner.ignored or path in self._slots or not (is_container(value) or holds_tensors(value)):
                    continue
                before = owner.others.get(key, MISSING) if owner.was_examined else UNKNOWN
                slot = self._slots[path] = Slot(owner, key, before)
                if not within:
                    self._save(slot, first=not owner.was_examined)
            if not within:
                owner.was_examined = True
                owner.ids = [*map(id, names.values())]
                owner.others = {k: v for k, v in names.items() if f"{owner.prefix}{k}" not in self._slots}

    def _save(self, slot: Slot, first: bool = False) -> None:
        value, before = slot.value, slot.saved
        self._bytes -= before.nbytes if before is not None else 0
        had, slot.held = slot.held, holds_tensors(value)
        slot.saved, slot.uncopied = None, False
        if slot.held or may_hold_later(value):
            try:
                slot.saved = Saved(value, before, self._copy if self._copies else None, self._registered)
            except Uncopied:
                slot.saved, slot.uncopied = Saved(value, registered=self._registered), True
                self._may_have_news = True
            self._bytes += slot.saved.nbytes
            slot.in_place |= before is not None and slot.saved.has_objects_of(before)
        else:
            slot.plain, slot.length = value, len(value) if is_container(value) else 0
        if first and not slot.held and slot.length <= _SHORT:
            slot.first = copy.copy(value)
        if not first and (slot.held or had):
            slot.changed = self._may_have_news = True
            slot.changes += 1

    def _copy(self, tensor: Tensor, others: int) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if self._bytes + others + size > self._limit:
            raise Uncopied
        with torch.no_grad():
            return tensor.clone()

    def _drop_constants(self) -> None:
        for slot in self._slots.values():
            if slot.saved is not None and not slot.changed:
                self._bytes -= slot.saved.nbytes
                slot.saved.drop_copies(_LARGE)
                self._bytes += slot.saved.nbytes

    def _unkept(self) -> Iterator[tuple[str, Any]]:
        for owner in self._owners:
            for key, value in owner.names.items():
                path = f"{owner.prefix}{key}"
                if key not in owner.ignored and (path not in self._slots or not is_data(value)):
                    yield path, value


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:6]) + (f" and {len(paths) - 6} others" if len(paths) > 6 else "")
