"""Nested state as a skeleton and a list of plain tensors, for snapshots in memory and for checkpoints on disk.

`Flattener` takes state apart. A snapshot copies the tensors and puts them back with `Restorer`, *into the live
objects*, so that references to a tensor, a dictionary or a list stay valid (DDP's buckets, an optimizer's
param_groups). A checkpoint writes the skeleton as JSON (`stabletrain.runtime.checkpoints.encoding`).
"""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stabletrain.errors import UserError
from stabletrain.runtime.snapshots.buffers import copy_each
from stabletrain.runtime.snapshots.tensor_kinds import (
    WrapperLayout,
    is_plain,
    is_sharded,
    is_wrapper,
    plain_tensors,
)

_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)
_SEQUENCES = frozenset({list, tuple, deque, set, frozenset})


class SnapshotError(UserError):
    """A state cannot be restored, because the live objects have been replaced."""


class TensorNode(NamedTuple):
    """Placeholder for a tensor.

    Args:
        first: index of its first plain tensor in the list.
        pieces: how many plain tensors hold its data.
        is_ordinary: its class is ``torch.Tensor``, so a new one can be made from its data.
        device: where it lives.
        layout: ``torch.strided``, or that of a sparse tensor.
        is_sharded: it is a DTensor, whose plain tensor is the local part.
        wrapper: of a wrapper subclass, how to build it again.
        inner: of a wrapper subclass, its inner tensors.
    """

    first: int
    pieces: int
    is_ordinary: bool
    device: torch.device
    layout: torch.layout = torch.strided
    is_sharded: bool = False
    wrapper: WrapperLayout | None = None
    inner: tuple[TensorNode, ...] = ()


class DictNode(NamedTuple):
    """Placeholder for a dictionary.

    Args:
        kind: its class.
        items: its keys as they are, and the skeletons of its values.
        metadata: skeleton of the versions in a module's ``state_dict`` (``_metadata``).
    """

    kind: Any
    items: list[tuple[Any, Any]]
    metadata: Any = None


class SequenceNode(NamedTuple):
    """Placeholder for a list, tuple, named tuple, deque, set or frozenset.

    Args:
        kind: its class.
        items: the skeletons of its items.
        maxlen: of a deque.
    """

    kind: Any
    items: list[Any]
    maxlen: int | None = None

    def build(self, items: Iterable[Any]) -> Any:
        """A container of this kind."""
        if self.kind is deque:
            return deque(items, self.maxlen)
        return self.kind(*items) if hasattr(self.kind, "_fields") else self.kind(items)


class ObjectNode(NamedTuple):
    """Placeholder for a value of any other kind.

    Args:
        value: the value, or a copy of it.
    """

    value: Any


class Kept(NamedTuple):
    """What a `Flattener`'s ``take`` returns for an object that is not copied: a restore puts the object itself back.

    Args:
        thing: the object.
    """

    thing: Any


class Flattener:
    """Takes values apart; immutable plain values stand for themselves. Tensors are not copied.

    Args:
        take: applied to every value that is neither a tensor, a container nor immutable: the default makes a copy. It
            may return a `Kept`.

    >>> flattener = Flattener()
    >>> weight = torch.ones(2)
    >>> skeleton = flattener.flatten({"a": weight, "b": [1, weight]})
    >>> flattener.tensors, [key for key, _ in skeleton.items]
    ([tensor([1., 1.])], ['a', 'b'])
    """

    def __init__(self, take: Callable[[Any], Any] = copy.deepcopy) -> None:
        self.tensors: list[Tensor] = []
        """The plain tensors found so far; one that is met again is not listed again."""
        self._take = take
        self._known: dict[int, TensorNode] = {}
        self._alive: list[Tensor] = []  # the id of a tensor that is freed could be that of another one

    def flatten(self, value: Any, take: Callable[[Any], Any] | None = None) -> Any:
        """The skeleton of a value.

        Args:
            value: anything; tensors are found in dictionaries, lists, tuples, named tuples, deques and sets.
            take: for this value, in place of the flattener's.
        """
        if isinstance(value, Tensor):
            known = self._known.get(id(value))
            return known if known is not None else self._new_tensor(value)
        if isinstance(value, dict):
            metadata = getattr(value, "_metadata", None) if isinstance(value, OrderedDict) else None
            items = [(key, self.flatten(each, take)) for key, each in value.items()]
            return DictNode(type(value), items, None if metadata is None else self.flatten(metadata, take))
        if isinstance(value, _IMMUTABLE):
            return value
        kind = type(value)
        if kind in _SEQUENCES or (isinstance(value, tuple) and hasattr(value, "_fields")):
            maxlen = value.maxlen if kind is deque else None
            return SequenceNode(kind, [self.flatten(each, take) for each in value], maxlen)
        return ObjectNode((take or self._take)(value))

    def _new_tensor(self, value: Tensor) -> TensorNode:
        first = len(self.tensors)
        if is_plain(value):
            self.tensors.append(value.detach() if value.requires_grad else value)  # `detach` takes a microsecond
            node = TensorNode(first, 1, type(value) is Tensor, value.device)
        elif is_wrapper(value) and not is_sharded(value):
            wrapper = WrapperLayout.of(value)
            inner = tuple(self._new_tensor(getattr(value, name)) for name in wrapper.names)  # listed side by side
            pieces = len(self.tensors) - first
            node = TensorNode(first, pieces, False, value.device, value.layout, False, wrapper, inner)
        else:
            self.tensors += plain_tensors((value,))
            pieces = len(self.tensors) - first
            node = TensorNode(first, pieces, False, value.device, value.layout, is_sharded(value))
        self._known[id(value)] = node
        self._alive.append(value)
        return node


class Restorer:
    """Puts values back into live objects.

    Args:
        copies: copies of a `Flattener`'s tensors.

    >>> live = {"a": torch.ones(2), "b": [1, 2]}
    >>> flattener = Flattener()
    >>> skeleton = flattener.flatten(live)
    >>> restorer = Restorer([each.clone() for each in flattener.tensors])
    >>> alias = live["a"]
    >>> live["a"].zero_(), live["b"].append(3), live.update(c=4)
    (tensor([0., 0.]), None, None)
    >>> restorer.restore(skeleton, live) is live
    True
    >>> restorer.finish()
    >>> live, alias
    ({'a': tensor([1., 1.]), 'b': [1, 2]}, tensor([1., 1.]))
    """

    def __init__(self, copies: Sequence[Tensor]) -> None:
        self._copies = copies
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._restored: dict[int, Tensor] = {}  # node -> its tensor: what was one tensor is one again
        self._nodes: dict[int, TensorNode] = {}  # live tensor -> its node: what were two tensors are two again

    def restore(self, node: Any, live: Any, where: str = "the state") -> Any:
        """Return the restored value: the live one, changed in place, if it is of the same kind, and else a new one.

        Args:
            node: skeleton of the value.
            live: the current value; anything.
            where: names it in an error.

        Raises:
            SnapshotError: if a tensor that cannot be made from its data is gone or has another layout.
        """
        if isinstance(node, TensorNode):
            return self._tensor(node, live, where)
        if isinstance(node, DictNode):
            return self._dict(node, live, where)
        if isinstance(node, SequenceNode):
            return self._sequence(node, live, where)
        if isinstance(node, ObjectNode):
            return node.value.thing if isinstance(node.value, Kept) else copy.deepcopy(node.value)
        return node

    def finish(self) -> None:
        """Copy all tensors at once; return when the copies are complete."""
        copy_each(self._targets, self._sources)
        self._targets, self._sources = [], []
        self._restored, self._nodes = {}, {}

    def _tensor(self, node: TensorNode, live: Any, where: str) -> Tensor:
        if id(node) not in self._restored:
            self._restored[id(node)] = self._new_or_live(node, live, where)
        return self._restored[id(node)]

    def _new_or_live(self, node: TensorNode, live: Any, where: str) -> Tensor:
        copies = self._copies[node.first : node.first + node.pieces]
        if isinstance(live, Tensor) and self._nodes.get(id(live), node) is node:
            plain = plain_tensors((live,))
            if len(plain) == len(copies) and all(
                a.shape == b.shape and a.dtype == b.dtype for a, b in zip(plain, copies, strict=True)
            ):
                self._targets += plain
                self._sources += copies
                self._nodes[id(live)] = node
                return live
        if not node.is_ordinary:
            raise SnapshotError(
                f"{where} is no longer the tensor that the snapshot was made of: expected one with the same class, "
                "shape and dtype. Do not replace parameters or optimizer state during a run that restores snapshots"
            )
        return copies[0].detach().clone().to(node.device)

    def _dict(self, node: DictNode, live: Any, where: str) -> Any:
        if not isinstance(live, node.kind):
            live = node.kind()
            if node.metadata is not None:
                live._metadata = self.restore(node.metadata, None, where)
        old = dict(live)
        if list(old) != [key for key, _ in node.items]:
            live.clear()  # restores the order of the keys too
        for key, each in node.items:
            live[key] = self.restore(each, old.get(key), f"{where}[{key if isinstance(key, str) else '...'}]")
        return live

    def _sequence(self, node: SequenceNode, live: Any, where: str) -> Any:
        old = list(live) if isinstance(live, list | tuple | deque) else []
        old += [None] * (len(node.items) - len(old))
        items = [self.restore(each, old[i], f"{where}[{i}]") for i, each in enumerate(node.items)]
        if isinstance(live, list) and node.kind is list:
            live[:] = items
            return live
        return node.build(items)
