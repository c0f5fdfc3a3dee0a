"""Numbers that are computed on the device during one step and read by the host later, all at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")


class Stacked(NamedTuple, Generic[K]):
    """Numbers of one step in a few tensors.

    Args:
        keys: of the numbers, in the order of the tensors.
        tensors: one-dimensional, of any types and devices.
    """

    keys: list[K]
    tensors: list[Tensor]


class DeviceNumbers(Generic[K]):
    """Collects numbers, each with a key; nothing is read by the host.

    >>> numbers = DeviceNumbers[str]()
    >>> numbers.add("a", torch.tensor(1.0))
    >>> numbers.add_each(["b", "c"], torch.tensor([2.0, 3.0]))
    >>> read([numbers.stacked()])
    [[('a', 1.0), ('b', 2.0), ('c', 3.0)]]
    """

    def __init__(self) -> None:
        self._single: dict[tuple[torch.device, torch.dtype], list[tuple[K, Tensor]]] = {}
        self._several: list[tuple[Sequence[K], Tensor]] = []

    def add(self, key: K, value: Tensor) -> None:
        """Add one number, a 0-d tensor that nothing changes in place."""
        self._single.setdefault((value.device, value.dtype), []).append((key, value))

    def add_each(self, keys: Sequence[K], values: Tensor) -> None:
        """Add the numbers of a one-dimensional tensor."""
        self._several.append((keys, values))

    def stacked(self) -> Stacked[K]:
        """All numbers so far."""
        keys, tensors = list[K](), list[Tensor]()
        for members in self._single.values():
            keys += [key for key, _ in members]
            tensors.append(torch.stack([value for _, value in members]))
        for several, values in self._several:
            keys += several
            tensors.append(values)
        return Stacked(keys, tensors)


def read(steps: Sequence[Stacked[K]]) -> list[list[tuple[K, float]]]:
    """The numbers of some steps, in one transfer from the device."""
    tensors = [tensor for step in steps for tensor in step.tensors]
    if not tensors:
        return [[] for _ in steps]
    device = tensors[0].device
    values = iter(torch.cat([tensor.to(device, torch.float64) for tensor in tensors]).tolist())
    return [[(key, next(values)) for key in step.keys] for step in steps]
