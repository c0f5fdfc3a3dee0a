"""One 64-bit number for each tensor, of its bits: which copies of a tensor are the same, without sending the tensor.

It is the sum of the tensor's bits read as 64-bit integers, modulo 2^64. A single flipped bit changes one term by a
power of two, so it always changes the sum, whatever the type. Several changes may cancel: the same bit of two words set
in one and cleared in the other, the highest bit of two words, elements that are exchanged with those of another word.
``torch.hash_tensor`` (an exclusive or) takes ten times as long for a large tensor on the CPU, has no complex and 8-bit
float types, does not see all bits of a ``bool``, and overlooks any two flips of the same bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 8
"""Bytes of the integers that are added."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element: the integers that have its bits. A copy of a ``bool`` may have others."""


def bit_sums(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor the sum of its bits as integers; equal for equal bits, whatever the strides. One read per device.

    Args:
        tensors: plain ones, of any type, shape, stride and device.

    Returns:
        Whole numbers of 64 bits with a sign; 0 for an empty tensor.

    >>> one, other = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0000002])
    >>> bit_sums([one, one.clone()])[0] == bit_sums([one])[0], bit_sums([one]) == bit_sums([other])
    (True, False)
    """
    found = [0] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for i, each in enumerate(tensors):
        by_device.setdefault(each.device, []).append(i)
    with torch.no_grad():
        for indices in by_device.values():
            sums = sums_on_device([tensors[i] for i in indices]).tolist()
            for i, value in zip(indices, sums, strict=True):
                found[i] = value
    return found


def sums_on_device(tensors: Sequence[Tensor]) -> Tensor:
    """As `bit_sums`, for tensors on one device, of which there is at least one: shape (n,), int64, without a read."""
    with torch.no_grad():
        return torch.stack([_sum(each) for each in tensors])


def _sum(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().resolve_conj().resolve_neg()
    size = tensor.element_size()
    if size in _INTEGERS:
        tensor = tensor.view(_INTEGERS[size])
    flat = tensor.contiguous().view(-1)
    if size >= _WORD:
        return flat.view(torch.int64).sum()
    per_word = _WORD // size
    if flat.storage_offset() % per_word:
        flat = flat.clone()  # a view as wider integers must begin at a multiple of their size
    filled = len(flat) // per_word * per_word
    rest = flat[filled:].sum(dtype=torch.int64)
    return rest if not filled else flat[:filled].view(torch.int64).sum() + rest
