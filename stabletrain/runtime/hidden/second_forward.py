"""What the forward pass of a block changes besides its output, as it was before, for the second forward pass."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stabletrain.runtime.internals import attributes

_DEPTH = 6
_LIBRARIES = frozenset({"torch", "lightning", "pytorch_lightning", "builtins", "functools"})


class SecondForward:
    """Buffers, attributes and arguments of a block as they were before its forward pass.

    Attributes are those of the block and its submodules that are not torch's: hidden state and counters. Lists,
    dictionaries and other objects that are attributes or arguments, such as the cache of keys and values of a
    transformer, get their items back; tensors in attributes their values. Tensors that are arguments are not copied.

    Args:
        block: whose forward pass begins.
        arguments: of its forward pass.
    """

    def __init__(self, block: nn.Module, arguments: Any = ()) -> None:
        self._owners = [(names, ignored) for names, ignored in _attributes(block)]
        held = [value for names, ignored in self._owners for key, value in names.items() if key not in ignored]
        self._containers: dict[int, Any] = {}
        for value in held:
            _find(value, self._containers, objects=False)
        _find(arguments, self._containers, objects=True)
        tensors = [*block.buffers(), *_plain_tensors(held)]
        self._tensors = list({id(each): each for each in tensors}.values())
        self._before = self._read()

    def contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Those of the first and of the second forward pass, as `torch.utils.checkpoint.checkpoint` takes them."""
        return contextlib.nullcontext(), self._second()

    @contextlib.contextmanager
    def put_back_after(self) -> Iterator[None]:
        """What the block changes within it is put back."""
        try:
            yield
        finally:
            self._write(self._before)

    @contextlib.contextmanager
    def _second(self) -> Iterator[None]:
        now = self._read()
        self._write(self._before)
        try:
            yield
        finally:
            self._write(now)

    def _read(self) -> tuple[list[Any], list[Any], list[Tensor]]:
        attributes = [{k: v for k, v in names.items() if k not in ignored} for names, ignored in self._owners]
        containers = [_items(each) for each in self._containers.values()]
        return attributes, containers, [each.detach().clone() for each in self._tensors]

    def _write(self, values: tuple[list[Any], list[Any], list[Tensor]]) -> None:
        for (names, ignored), own in zip(self._owners, values[0], strict=True):
            _replace(names, {**{k: v for k, v in names.items() if k in ignored}, **own})
        for container, items in zip(self._containers.values(), values[1], strict=True):
            _put(container, items)
        with torch.no_grad():
            for tensor, value in zip(self._tensors, values[2], strict=True):
                # through .data: autograd may have saved the buffer, and would take a new version for a change
                tensor.data.copy_(value)


def _attributes(block: nn.Module) -> Iterator[tuple[dict[str, Any], frozenset[str]]]:
    """The attributes of a block's modules, each with the names that are left out."""
    for _, module in attributes.attribute_owners(block):
        names = attributes.names_of(module)
        if not attributes.is_of_library(module):
            yield names, attributes.ignored_attributes(module) | {"forward"}


def _find(value: Any, found: dict[int, Any], objects: bool, depth: int = _DEPTH) -> None:
    """Add the containers in a value, and if asked for the objects, which an argument may be made of."""
    if not depth or id(value) in found or isinstance(value, Tensor | nn.Module | type):
        return
    inner: Iterable[Any] = ()
    if isinstance(value, tuple):
        inner = value
    elif isinstance(value, list | deque | set):
        found[id(value)] = value
        inner = value
    elif isinstance(value, dict):
        found[id(value)] = value
        inner = value.values()
    elif objects and hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _LIBRARIES:
        found[id(value)] = value
        inner = vars(value).values()
    for each in list(inner):
        _find(each, found, objects, depth - 1)


def _plain_tensors(values: Iterable[Any], depth: int = _DEPTH) -> Iterator[Tensor]:
    """The tensors in attributes that are no result of the graph, which are changed in place if at all."""
    for value in values:
        if isinstance(value, Tensor):
            if not value.requires_grad:
                yield value
        elif depth and isinstance(value, list | tuple | deque):
            yield from _plain_tensors(value, depth - 1)
        elif depth and isinstance(value, dict):
            yield from _plain_tensors(value.values(), depth - 1)


def _items(container: Any) -> Any:
    if isinstance(container, list | deque | set):
        return list(container)
    return dict(container if isinstance(container, dict) else vars(container))


def _put(container: Any, items: Any) -> None:
    if isinstance(container, dict):
        _replace(container, items)
    elif not isinstance(container, list | deque | set):
        _replace(vars(container), items)
    elif [*map(id, container)] != [*map(id, items)]:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(items)


def _replace(names: dict[str, Any], values: dict[str, Any]) -> None:
    same = names.keys() == values.keys() and all(names[key] is values[key] for key in names)
    if not same:
        names.clear()
        names.update(values)
