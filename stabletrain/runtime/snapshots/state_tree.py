"""Copies of nested state: tensors go into one list, to be copied at once; everything else is kept beside it.

`freeze` takes a value apart, `Thaw` puts it back *into the live objects*: whoever holds a reference to a tensor, a
dictionary or a list (DDP's buckets, an optimizer's param_groups) keeps it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stabletrain.errors import UserError
from stabletrain.runtime.snapshots.buffers import copy_each, plain_tensors

_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)


class SnapshotError(UserError):
    """A state that cannot be put back: the live objects are no longer what they were."""


class KeptTensor(NamedTuple):
    """Stands for a tensor.

    Args:
        first: index of its first plain tensor in the list.
        pieces: how many plain tensors it consists of.
        plain: it is an ordinary tensor, and can be made anew.
        device: where it lives.
    """

    first: int
    pieces: int
    plain: bool
    device: torch.device


class _Object(NamedTuple):
    """Stands for an object of an unknown kind: a deep copy."""

    copy: Any


class _Dict(NamedTuple):
    kind: type
    items: list[tuple[Any, Any]]


class _Sequence(NamedTuple):
    kind: type
    items: list[Any]


def freeze(value: Any, tensors: list[Tensor], known: dict[int, KeptTensor]) -> Any:
    """Take a value apart.

    Args:
        value: tensors in dictionaries, lists, tuples and deques, and anything else.
        tensors: receives the plain tensors; they are not copied here.
        known: tensors seen already, by identity, so that shared ones are copied once.
    """
    if isinstance(value, _IMMUTABLE):
        return value
    if isinstance(value, Tensor):
        kept = known.get(id(value))
        if kept is None:
            plain = plain_tensors((value,))
            ordinary = len(plain) == 1 and type(value) is Tensor
            kept = known[id(value)] = KeptTensor(len(tensors), len(plain), ordinary, value.device)
            tensors += plain
        return kept
    if isinstance(value, dict):
        return _Dict(type(value), [(key, freeze(each, tensors, known)) for key, each in value.items()])
    if type(value) in (list, tuple, deque) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        return _Sequence(type(value), [freeze(each, tensors, known) for each in value])
    return _Object(copy.deepcopy(value))


class Thaw:
    """Puts frozen values back.

    Args:
        copies: the copies of the plain tensors that `freeze` listed.

    >>> live = {"a": torch.ones(2), "b": [1, 2]}
    >>> tensors = []
    >>> frozen = freeze(live, tensors, {})
    >>> thaw = Thaw([each.clone() for each in tensors])
    >>> alias = live["a"]
    >>> live["a"].zero_(), live["b"].append(3), live.update(c=4)
    (tensor([0., 0.]), None, None)
    >>> thaw.into(frozen, live) is live
    True
    >>> thaw.finish()
    >>> live, alias
    ({'a': tensor([1., 1.]), 'b': [1, 2]}, tensor([1., 1.]))
    """

    def __init__(self, copies: Sequence[Tensor]) -> None:
        self._copies = copies
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []

    def into(self, frozen: Any, live: Any, where: str = "the state") -> Any:
        """The value to use: the live one, changed in place, wherever it is of the same kind.

        Args:
            frozen: of `freeze`.
            live: what is there now; anything.
            where: names it in an error.

        Raises:
            SnapshotError: if a tensor that cannot be made anew is gone or has another layout.
        """
        if isinstance(frozen, KeptTensor):
            return self._tensor(frozen, live, where)
        if isinstance(frozen, _Dict):
            return self._dict(frozen, live, where)
        if isinstance(frozen, _Sequence):
            return self._sequence(frozen, live, where)
        if isinstance(frozen, _Object):
            return copy.deepcopy(frozen.copy)
        return frozen

    def finish(self) -> None:
        """Copy all tensors, at once; return when they are there."""
        copy_each(self._targets, self._sources)

    def _tensor(self, frozen: KeptTensor, live: Any, where: str) -> Tensor:
        copies = self._copies[frozen.first : frozen.first + frozen.pieces]
        if isinstance(live, Tensor):
            plain = plain_tensors((live,))
            if len(plain) == len(copies) and all(
                a.shape == b.shape and a.dtype == b.dtype for a, b in zip(plain, copies, strict=True)
            ):
                self._targets += plain
                self._sources += copies
                return live
        if not frozen.plain:
            raise SnapshotError(
                f"rollback: {where} is no longer the tensor that the snapshot was made of (a layout of its own cannot "
                "be made anew). Do not replace parameters or optimizer state during a run with plugins/spike=rollback"
            )
        return copies[0].detach().clone().to(frozen.device)

    def _dict(self, frozen: _Dict, live: Any, where: str) -> Any:
        if not isinstance(live, frozen.kind):
            live = frozen.kind()
        old = dict(live)
        if list(old) != [key for key, _ in frozen.items]:
            live.clear()  # also the order of the keys is as it was
        for key, each in frozen.items:
            live[key] = self.into(each, old.get(key), f"{where}[{key if isinstance(key, str) else '...'}]")
        return live

    def _sequence(self, frozen: _Sequence, live: Any, where: str) -> Any:
        old = list(live) if isinstance(live, list | tuple | deque) else []
        old += [None] * (len(frozen.items) - len(old))
        items = [self.into(each, old[i], f"{where}[{i}]") for i, each in enumerate(frozen.items)]
        if isinstance(live, list) and frozen.kind is list:
            live[:] = items
            return live
        return frozen.kind(*items) if hasattr(frozen.kind, "_fields") else frozen.kind(items)
