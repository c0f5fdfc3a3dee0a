"""Batches of worker processes come in shared memory, of which every tensor keeps a file open as long as it lives."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn


def copy_shared_tensors(batch: Any) -> Any:
    """Replace the tensors of a batch that lie in shared memory by copies in this process's own, so their files close.

    A batch that is stored for long would otherwise hold its files for long: two tensors per batch and 500 batches reach
    the usual limit of 1,024 open files. Mappings, lists and objects are changed in place, tuples are made anew.

    Args:
        batch: anything that a train loader returns.

    Returns:
        The batch to use.
    """
    return _copied(batch, {})


def _copied(value: Any, known: dict[int, Any]) -> Any:
    if id(value) in known:  # referred to twice, or from within itself
        return known[id(value)]
    known[id(value)] = value
    if type(value) is Tensor:
        if value.layout is torch.strided and value.is_cpu and value.untyped_storage().is_shared():
            known[id(value)] = value.clone()
    elif isinstance(value, Tensor):
        on_host = value.layout is torch.strided and value.device.type == "cpu"
        if on_host and value.is_shared():  # type: ignore[no-untyped-call]
            known[id(value)] = value.clone()
    elif isinstance(value, MutableMapping):
        for key, each in value.items():
            if (copied := _copied(each, known)) is not each:
                value[key] = copied
    elif isinstance(value, list):
        value[:] = [_copied(each, known) for each in value]
    elif isinstance(value, tuple):
        items = [_copied(each, known) for each in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            known[id(value)] = type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, nn.Module | type):
        attributes = vars(value)  # past __setattr__, which a frozen dataclass refuses
        for name, each in attributes.items():
            if (copied := _copied(each, known)) is not each:
                attributes[name] = copied
    return known[id(value)]
