"""What is in a value: tensors, in tuples, lists and dictionaries, nested."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

DEPTH = 8
EXAMINED = 64
"""Items of a long container that are examined: those at its ends. A list to which every step appends is long."""


PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


def is_container(value: Any) -> bool:
    """Whether a value may come to hold tensors without being replaced."""
    return isinstance(value, list | deque | dict)


def tensors_in(value: Any, depth: int = DEPTH) -> Iterator[Tensor]:
    """The tensors in a value; of a long container, those in its first and last items."""
    if isinstance(value, Tensor):
        yield value
    elif depth and (is_container(value) or isinstance(value, tuple)):
        for each in ends_of(value):
            yield from tensors_in(each, depth - 1)


def holds_tensors(value: Any) -> bool:
    """Whether there are tensors in a value that are no parameters."""
    return any(not isinstance(each, nn.Parameter) for each in tensors_in(value))


def may_hold_later(value: Any) -> bool:
    """Whether tensors may be added to a container within a short container, which its own length does not show."""
    return is_container(value) and len(value) <= EXAMINED and any(map(is_container, ends_of(value)))


def is_data(value: Any, depth: int = DEPTH) -> bool:
    """Whether a value is made of tensors, plain values, tuples, lists and dictionaries only."""
    if isinstance(value, (Tensor, *PLAIN)):
        return True
    if not depth or (type(value) not in (list, tuple, dict, deque, OrderedDict) and not hasattr(value, "_fields")):
        return False
    return all(is_data(each, depth - 1) for each in ends_of(value))


def ends_of(value: Any) -> list[Any]:
    """All items of a container, or the first and the last of a long one."""
    if len(value) <= EXAMINED:
        return list(value.values()) if isinstance(value, dict) else list(value)
    if isinstance(value, dict):
        return [next(iter(value.values())), next(reversed(value.values()))]
    return [value[0], value[-1]]
