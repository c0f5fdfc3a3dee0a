"""Parts of tensors: which elements of a whole tensor one process holds or wants, and where they are in a file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

Run: TypeAlias = tuple[int, int]
"""The first index, and the one after the last."""
Region: TypeAlias = tuple[tuple[Run, ...], ...]
"""For each dimension the indices that are held, as runs; the product of all dimensions is the part."""


class Box(NamedTuple):
    """A rectangular block of a whole tensor.

    Args:
        offset: of its first element in the whole tensor, for each dimension.
        shape: its size.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def whole(shape: Sequence[int]) -> Region:
    """All of a tensor.

    Args:
        shape: of the tensor.
    """
    return tuple(((0, size),) for size in shape)


def region_of(indices: Sequence[Tensor]) -> Region:
    """The region of the indices along each dimension.

    >>> import torch
    >>> region_of([torch.tensor([0, 1, 4, 5]), torch.arange(3)])
    (((0, 2), (4, 6)), ((0, 3),))
    """
    return tuple(tuple(_runs(each)) for each in indices)


def sizes(region: Region) -> tuple[int, ...]:
    """The shape of the part.

    >>> sizes((((0, 2), (4, 6)), ((0, 3),)))
    (4, 3)
    """
    return tuple(sum(end - start for start, end in runs) for runs in region)


def boxes(region: Region) -> list[tuple[Box, Box]]:
    """The blocks of a part, each with its place in the part itself; blocks without elements are left out.

    >>> boxes((((0, 2), (4, 6)), ((0, 3),)))[1]
    (Box(offset=(4, 0), shape=(2, 3)), Box(offset=(2, 0), shape=(2, 3)))
    """
    found = []
    for runs in itertools.product(*([*_placed(each)] for each in region)):
        shape = tuple(end - start for (start, end), _ in runs)
        box = Box(tuple(start for (start, _), _ in runs), shape)
        if box.numel:
            found.append((box, Box(tuple(at for _, at in runs), shape)))
    return found


def overlap(one: Box, other: Box) -> Box | None:
    """The elements that two blocks of one tensor share; None if there are none.

    >>> overlap(Box((0, 0), (2, 4)), Box((1, 2), (5, 5)))
    Box(offset=(1, 2), shape=(1, 2))
    """
    low = tuple(max(pair) for pair in zip(one.offset, other.offset, strict=True))
    high = (min(a + m, b + n) for a, m, b, n in zip(one.offset, one.shape, other.offset, other.shape, strict=True))
    shape = tuple(b - a for a, b in zip(low, high, strict=True))
    return Box(low, shape) if all(size > 0 for size in shape) else None


def view(tensor: Tensor, origin: Sequence[int], box: Box) -> Tensor:
    """A block of a tensor, not copied.

    Args:
        tensor: itself a block of the whole one.
        origin: the offset of ``tensor`` in the whole one.
        box: in the whole one, within ``tensor``.
    """
    starts = [a - b for a, b in zip(box.offset, origin, strict=True)]
    for dim, (start, size) in enumerate(zip(starts, box.shape, strict=True)):
        tensor = tensor.narrow(dim, start, size)
    return tensor


def _runs(indices: Tensor) -> Iterator[Run]:
    if not len(indices):
        return
    gaps = (indices.diff() != 1).nonzero().flatten().tolist()  # a run ends at each of these positions
    for first, last in zip([0, *(gap + 1 for gap in gaps)], [*gaps, len(indices) - 1], strict=True):
        yield int(indices[first]), int(indices[last]) + 1


def _placed(runs: tuple[Run, ...]) -> Iterator[tuple[Run, int]]:
    """Each run, with its place in the part."""
    at = 0
    for start, end in runs:
        yield (start, end), at
        at += end - start
