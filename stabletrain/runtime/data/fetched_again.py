"""Stands for a batch that the tape does not store: it is fetched again by its sample indices when it is replayed."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_READ = 64
"""Elements that are compared of each tensor, evenly spaced."""


class FetchedAgain(NamedTuple):
    """What is known of the batch.

    Args:
        outline: of the batch, see `outline`.
    """

    outline: tuple[Any, ...]


def outline(batch: Any) -> tuple[Any, ...]:
    """What a batch is recognized by: numbers, texts, and of each tensor its shape, dtype and some elements.

    Args:
        batch: anything that a train loader returns; of objects only the class is compared.

    >>> outline([torch.zeros(2), "a"]) == outline([torch.zeros(2), "a"]) != outline([torch.ones(2), "a"])
    True
    """
    return tuple(_of_leaf(leaf) for leaf in tree_leaves(batch))


def _of_leaf(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray) and leaf.dtype.hasobject:
        return type(leaf), leaf.shape
    if isinstance(leaf, np.ndarray):
        flat = leaf.reshape(-1)
        return leaf.dtype, leaf.shape, zlib.crc32(np.ascontiguousarray(flat[:: 1 + flat.size // _READ]).tobytes())
    if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.is_cpu and not leaf.is_nested:
        values = leaf.detach().resolve_conj().resolve_neg().reshape(-1)
        some = values[:: 1 + values.numel() // _READ].contiguous()
        return leaf.dtype, leaf.shape, zlib.crc32(some.view(torch.uint8).numpy().tobytes()) if some.numel() else 0
    if isinstance(leaf, bool | int | float | str | bytes | type(None)):
        return type(leaf), repr(leaf)  # a NaN equals itself
    return type(leaf)
