"""A copy of one value that holds tensors: a tensor, or tuples, lists and dictionaries of tensors, nested."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.runtime.hidden.contents import DEPTH, EXAMINED
from stabletrain.runtime.internals.attributes import version_of


class Uncopied(Exception):
    """A value is too large to copy, or was not copied."""


class Leaf:
    """One tensor as it was: the object, without keeping it alive, and a copy of its numbers.

    Args:
        tensor: the tensor; if it is part of an autograd graph, the graph is not kept.
        copy: of it, detached; None: only changes are to be found.
    """

    __slots__ = ("_ref", "_requires_grad", "_version", "copy")

    def __init__(self, tensor: Tensor, copy: Tensor | None) -> None:
        self._ref = weakref.ref(tensor)
        self._version = version_of(tensor)
        self._requires_grad = tensor.requires_grad and tensor.is_leaf
        self.copy = copy

    @property
    def nbytes(self) -> int:
        """Size of the copy, bytes."""
        return 0 if self.copy is None else self.copy.numel() * self.copy.element_size()

    def is_current(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, unchanged."""
        return self._ref() is tensor and version_of(tensor) == self._version

    def is_same_object(self, tensor: Tensor) -> bool:
        """Whether this is the tensor, whatever its numbers are now."""
        return self._ref() is tensor

    def restored(self) -> Tensor:
        """The tensor as it was: the object itself if it is alive and no part of a graph, else a new one."""
        tensor = self._ref()
        if tensor is not None and tensor.is_leaf and not tensor.is_inference():
            if version_of(tensor) != self._version:
                if self.copy is None:
                    raise Uncopied
                with torch.no_grad():
                    tensor.copy_(self.copy)
                self._version = version_of(tensor)
            return tensor
        if self.copy is None:
            raise Uncopied
        new = self.copy.clone().requires_grad_(self._requires_grad)
        self._ref, self._version = weakref.ref(new), version_of(new)
        return new


class _Sequence:
    __slots__ = ("identity", "items", "kind", "length", "maxlen")

    def __init__(self, value: Any, items: list[Any]) -> None:
        self.kind, self.identity, self.length = type(value), id(value), len(value)
        self.maxlen = value.maxlen if isinstance(value, deque) else None
        self.items = items

    def build(self, items: list[Any]) -> Any:
        if self.kind is deque:
            return deque(items, self.maxlen)
        return self.kind(*items) if hasattr(self.kind, "_fields") else self.kind(items)


class _Long:
    """A long list: its items themselves, which its owner holds too."""

    __slots__ = ("identity", "items", "kind", "maxlen")

    def __init__(self, value: Any) -> None:
        self.kind, self.identity, self.items = type(value), id(value), list(value)
        self.maxlen = value.maxlen if isinstance(value, deque) else None


class _Mapping:
    __slots__ = ("identity", "items", "value")

    def __init__(self, value: dict[Any, Any], items: dict[Any, Any]) -> None:
        self.identity, self.items = id(value), items
        self.value = type(value)


class Saved:
    """A value as it was at one moment.

    Args:
        value: holds tensors.
        before: the same value as it was saved earlier; copies of unchanged tensors are taken over.
        copy: copies a tensor, given the bytes of the copies so far, or raises `Uncopied`; None: only changes are found.
        registered: ids of tensors that are kept otherwise, as buffers are.

    Raises:
        Uncopied: from ``copy``.
    """

    def __init__(
        self,
        value: Any,
        before: Saved | None = None,
        copy: Callable[[Tensor, int], Tensor] | None = None,
        registered: Container[int] = (),
    ) -> None:
        self._copy, self._registered = copy, registered
        self._known = {} if before is None else before.leaves
        self.nbytes = 0
        """Size of the copies, bytes."""
        self.leaves: dict[int, Leaf] = {}
        """By the ids of their tensors."""
        self._node = self._save(value, DEPTH)
        self._known = {}

    def has_objects_of(self, before: Saved) -> bool:
        """Whether a tensor is the same object as before, changed in place."""
        return any(key in before.leaves and before.leaves[key] is not leaf for key, leaf in self.leaves.items())

    def is_beginning_of(self, value: Any) -> bool:
        """Whether a list holds what was saved, and more items after it."""
        node = self._node
        if not isinstance(node, _Sequence | _Long) or not isinstance(value, list) or id(value) != node.identity:
            return False
        count = len(node.items)
        return 0 < count < len(value) and _is_item(node.items[-1], value[count - 1])

    def restore_where(self, value: Any, dropped: Tensor) -> bool:
        """Change a value's tensors to what was saved where ``dropped`` is 1; False if they do not correspond."""
        pairs: list[tuple[Leaf, Tensor]] = []
        if not _pair(self._node, value, pairs):
            return False
        for leaf, tensor in pairs:
            assert leaf.copy is not None, "only copies are paired"
            with torch.no_grad():
                tensor.detach().copy_(torch.where(dropped.to(tensor.device).bool(), leaf.copy, tensor))
        return True

    def drop_copies(self, above: int) -> None:
        """Free the copies of more than ``above`` bytes."""
        for leaf in self.leaves.values():
            if leaf.nbytes > above:
                self.nbytes -= leaf.nbytes
                leaf.copy = None

    def is_current(self, value: Any) -> bool:
        """Whether a value is what was saved: the same objects, unchanged."""
        return _is_current(self._node, value)

    def restored(self, live: Any) -> Any:
        """The value as it was; containers that are still there are changed in place.

        Args:
            live: what is there now.

        Raises:
            Uncopied: if a tensor was not copied.
        """
        return _restored(self._node, live)

    def _save(self, value: Any, depth: int) -> Any:
        if isinstance(value, nn.Parameter) or id(value) in self._registered:
            return value
        if isinstance(value, Tensor):
            if (known := self.leaves.get(id(value))) is not None:
                return known
            leaf = self._known.get(id(value))
            if leaf is None or not leaf.is_current(value) or (self._copy is not None and leaf.copy is None):
                leaf = Leaf(value, None if self._copy is None else self._copy(value.detach(), self.nbytes))
            self.nbytes += leaf.nbytes
            self.leaves[id(value)] = leaf
            return leaf
        if not depth or not isinstance(value, list | tuple | deque | dict):
            return value
        if isinstance(value, dict):
            return _Mapping(value, {key: self._save(each, depth - 1) for key, each in value.items()})
        if len(value) > EXAMINED:
            return _Long(value)
        return _Sequence(value, [self._save(each, depth - 1) for each in value])


def _is_current(node: Any, value: Any) -> bool:
    if isinstance(node, Leaf):
        return isinstance(value, Tensor) and node.is_current(value)
    if isinstance(node, _Sequence):
        return (
            id(value) == node.identity
            and type(value) is node.kind
            and len(value) == node.length
            and all(map(_is_current, node.items, value))
        )
    if isinstance(node, _Long):
        same = id(value) == node.identity and type(value) is node.kind and len(value) == len(node.items)
        return same and value[0] is node.items[0] and value[-1] is node.items[-1]
    if isinstance(node, _Mapping):
        if id(value) != node.identity or type(value) is not node.value or len(value) != len(node.items):
            return False
        missing = object()
        return all(_is_current(each, value.get(key, missing)) for key, each in node.items.items())
    return node is value


def _is_item(node: Any, value: Any) -> bool:
    return node.is_current(value) if isinstance(node, Leaf) else node is value


def _pair(node: Any, value: Any, pairs: list[tuple[Leaf, Tensor]]) -> bool:
    """Add the tensors of a value, each with how it was; False if they do not correspond."""
    if isinstance(node, Leaf):
        if not isinstance(value, Tensor) or value.is_inference():
            return False
        if node.is_current(value):
            return True
        if node.copy is None or (node.copy.shape, node.copy.dtype) != (value.shape, value.dtype):
            return False
        pairs.append((node, value))
        return True
    if isinstance(node, _Sequence):
        if type(value) is not node.kind or len(value) != node.length:
            return False
        return all(_pair(each, item, pairs) for each, item in zip(node.items, value, strict=True))
    if isinstance(node, _Mapping):
        if type(value) is not node.value or list(value) != list(node.items):
            return False
        return all(_pair(each, value[key], pairs) for key, each in node.items.items())
    return _is_current(node, value)


def _restored(node: Any, live: Any) -> Any:
    if isinstance(node, Leaf):
        return node.restored()
    if isinstance(node, _Sequence | _Long):
        if isinstance(node, _Long):
            items = list(node.items)
        else:
            old = list(live) if isinstance(live, list | tuple | deque) else []
            old += [None] * (len(node.items) - len(old))
            items = [_restored(each, old[i]) for i, each in enumerate(node.items)]
        if id(live) == node.identity and isinstance(live, list | deque):
            live.clear()
            live.extend(items)
            return live
        if isinstance(node, _Sequence):
            return node.build(items)
        return deque(items, node.maxlen) if node.kind is deque else node.kind(items)
    if isinstance(node, _Mapping):
        same = id(live) == node.identity and isinstance(live, dict)
        target = live if same else node.value()
        items_now = {key: _restored(each, target.get(key) if same else None) for key, each in node.items.items()}
        target.clear()
        target.update(items_now)
        return target
    return node
