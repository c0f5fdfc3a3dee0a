"""The state of a data loader: generators, counters and short containers of it and of all that it holds, put back.

Reading a loader draws from its generator, advances counters of its sampler and its dataset, and leaves its workers
behind. None of that is left when `preserved` ends. Tensors, arrays and other large contents are not copied.
"""

from __future__ import annotations

import io
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from stabletrain.errors import UserError

_DEPTH = 8
"""Levels of objects that are followed from the loader."""
_ITEMS = 10_000
"""Items of the longest list or mapping that is put back."""
_FOLLOWED_ITEMS = 100
"""Items of the longest list whose items are followed, such as the transforms of an image."""
_NOT_FOLLOWED = (
    type, ModuleType, FunctionType, BuiltinFunctionType, str, bytes, int, float, complex, bool, type(None),
    torch.Tensor, torch.dtype, torch.device, np.ndarray, np.generic, nn.Module, random.SystemRandom,
)  # fmt: skip
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


@contextmanager
def preserved(loader: Any, name: str) -> Iterator[None]:
    """Put back the state of a loader when the block ends, whatever happens in it.

    Args:
        loader: a DataLoader, or anything else that can be iterated anew.
        name: of the argument, for messages.

    Raises:
        UserError: if it is, or holds, an iterator: that cannot be put back.
    """
    restore: list[Callable[[], None]] = []
    _visit(loader, name, restore, set(), _DEPTH)
    try:
        yield
    finally:
        for each in restore:
            each()


def _visit(value: Any, name: str, restore: list[Callable[[], None]], seen: set[int], depth: int) -> None:
    if isinstance(value, MethodType):
        value = value.__self__
    if isinstance(value, _NOT_FOLLOWED) or id(value) in seen or depth == 0:
        return
    if type(value).__module__.partition(".")[0] in _LIGHTNING:  # a data module's Trainer holds iterators of its own
        return
    seen.add(id(value))
    if isinstance(value, io.IOBase):
        restore.append(_file(value, name))
        return
    if (undo := _generator(value)) is not None:
        restore.append(undo)
        return
    if hasattr(type(value), "__next__") and hasattr(type(value), "__iter__"):
        raise UserError(
            f"doctor: {name} is an iterator ({type(value).__name__}), which cannot be read without moving it; pass a "
            "loader that can be iterated anew, such as a DataLoader made for this call"
        )
    if isinstance(value, list | tuple | dict | set | deque):
        _container(value, name, restore, seen, depth)
        return
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return
    before = dict(attributes)

    def put_back() -> None:
        attributes.clear()
        attributes.update(before)

    restore.append(put_back)
    for key, each in before.items():
        _visit(each, f"{name}.{key}", restore, seen, depth - 1)


def _container(value: Any, name: str, restore: list[Callable[[], None]], seen: set[int], depth: int) -> None:
    if len(value) > _ITEMS:
        return
    if isinstance(value, list | deque):
        items = list(value)

        def put_back() -> None:
            value.clear()
            value.extend(items)

        restore.append(put_back)
    elif isinstance(value, dict | set):
        content = value.copy()

        def refill() -> None:
            value.clear()
            value.update(content)

        restore.append(refill)
    if len(value) <= _FOLLOWED_ITEMS:
        for index, each in enumerate(value.values() if isinstance(value, dict) else value):
            _visit(each, f"{name}[{index}]", restore, seen, depth - 1)


def _file(value: io.IOBase, name: str) -> Callable[[], None]:
    """What puts the position of an open file back."""
    if value.closed:
        return lambda: None
    try:
        position = value.tell()
        value.seek(position)
    except (OSError, ValueError):
        raise UserError(
            f"doctor: {name} is a stream ({type(value).__name__}), which cannot be read without moving it; pass a "
            "loader that opens it anew in each iteration"
        ) from None

    def put_back() -> None:
        if not value.closed:
            value.seek(position)

    return put_back


def _generator(value: Any) -> Callable[[], None] | None:
    """What puts a random generator back; None for other objects."""
    if isinstance(value, torch.Generator):
        tensor = value.get_state()

        def put_back() -> None:
            value.set_state(tensor)

        return put_back
    if isinstance(value, random.Random):
        words = value.getstate()
        return lambda: value.setstate(words)
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, np.random.Generator):
        state = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", state)
    return None
