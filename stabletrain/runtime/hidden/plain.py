"""Values that hold tensors as plain lists and tensors, which every checkpoint format stores, and back."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, str)


class Unsaved(Exception):
    """A value cannot be stored as data."""


def to_plain(value: Any) -> Any:
    """A value as tensors on the CPU, plain values, and lists whose first item names a kind.

    Args:
        value: of tensors, tuples, lists, deques and dictionaries with plain keys.

    Raises:
        Unsaved: for anything else, such as a named tuple, whose class a file cannot name, or a sparse tensor.

    >>> from_plain(to_plain({"h": (torch.ones(1), 2)}), torch.device("cpu"))
    {'h': (tensor([1.]), 2)}
    """
    kind = type(value)
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_nested:
            raise Unsaved
        if hasattr(value, "__tensor_flatten__"):  # DTensor and other classes that wrap tensors
            raise Unsaved
        return ["tensor", value.detach().cpu(), value.device.type == "cpu", value.requires_grad and value.is_leaf]
    if kind in _PLAIN:
        return value
    if kind in (list, tuple):
        return [kind.__name__, [to_plain(each) for each in value]]
    if kind is deque:
        return ["deque", [to_plain(each) for each in value], value.maxlen]
    if kind in (dict, OrderedDict) and all(type(key) in _PLAIN for key in value):
        return ["dict", [[key, to_plain(each)] for key, each in value.items()], kind is OrderedDict]
    raise Unsaved


def from_plain(plain: Any, device: torch.device) -> Any:
    """The inverse of `to_plain`; its tensors are copies.

    Args:
        plain: what `to_plain` returned.
        device: where tensors go that were not on the CPU.

    Raises:
        TypeError: for anything else.
        ValueError: for a list of a wrong length.
    """
    if type(plain) in _PLAIN:
        return plain
    if not isinstance(plain, list) or not plain:
        raise TypeError(f"expected the hidden state of a module, got {type(plain).__name__}")
    kind, content, *more = plain
    if kind == "tensor" and isinstance(content, Tensor):
        on_cpu, requires_grad = more
        new = content.detach().to("cpu" if on_cpu else device, copy=True)
        return new.requires_grad_() if requires_grad else new
    if not isinstance(content, list):
        raise TypeError(f"expected a list of items, got {type(content).__name__}")
    if kind == "dict":
        pairs = {key: from_plain(each, device) for key, each in content}
        return OrderedDict(pairs) if more == [True] else pairs
    items = [from_plain(each, device) for each in content]
    if kind == "deque":
        (maxlen,) = more
        return deque(items, maxlen)
    if kind not in ("list", "tuple"):
        raise TypeError(f"expected the hidden state of a module, got a {kind!r}")
    return tuple(items) if kind == "tuple" else items
