"""How much memory a batch takes, whatever it is made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn


def batch_bytes(batch: Any) -> int:
    """Bytes of all tensors and arrays in a batch, each counted once, and of its texts.

    They are found in mappings (also `collections.UserDict`, as tokenizers return), in lists, tuples, sets and deques,
    and in the attributes of objects, such as a class with a ``to`` method. Python's own overhead is not counted.

    Args:
        batch: anything that a train loader returns.

    >>> import torch
    >>> batch_bytes({"x": torch.zeros(3), "y": [np.zeros(2), "abc"]})
    31
    """
    total = 0
    seen: set[int] = set()
    left: list[Any] = [batch]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))  # `batch` keeps all of them alive, so no identity is used twice
        kind = type(value)
        if kind is tuple or kind is list:  # the usual kinds first: this runs for each batch that is stored
            left += value
        elif kind is dict:
            left += value.values()
        elif isinstance(value, Tensor):
            total += value.element_size() * value.numel()
        elif isinstance(value, np.ndarray):
            total += value.nbytes
        elif isinstance(value, str | bytes | bytearray | memoryview):
            total += len(value)
        elif not isinstance(value, int | float | complex | type(None) | type):
            left += _parts(value)
    return total


def _parts(value: Any) -> Iterable[Any]:
    """What a container or an object holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset | deque):  # no others: iterating them may read files
        return list(value)
    if isinstance(value, nn.Module):  # referenced by the batch, and not copied with it
        return ()
    slots = [getattr(value, name, None) for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(value, "__dict__", {}).values(), *slots]
