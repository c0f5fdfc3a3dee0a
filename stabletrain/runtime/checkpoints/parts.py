"""Which process writes which part of a checkpoint's tensors: each part once, and about the same bytes for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.regions import Region, sizes


@dataclass(frozen=True, eq=False)
class Part:
    """A tensor of the model or of its optimizer, of which this process holds a part or all.

    Args:
        name: in the checkpoint, such as ``state_dict.net.0.weight``; the same at any number of processes.
        dtype: of its elements.
        shape: of the whole tensor.
        region: the elements that this process holds.
        local: these elements; None: other processes hold them.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    region: Region
    local: Tensor | None

    @property
    def held(self) -> Held:
        """What the others have to know of it."""
        return Held(self.dtype, self.shape, self.region)


class Held(NamedTuple):
    """What one process holds of a tensor: type and shape of the whole, and the elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    region: Region


Table: TypeAlias = Mapping[str, Held]
"""By name, what one process holds."""


def assign(tables: Sequence[Table]) -> list[set[str]]:
    """Which of the tensors that it holds each process writes its part of.

    Parts that several processes hold are written by one of them, so that all write about the same bytes. The result is
    a function of the arguments alone, so that all processes find the same one.

    Args:
        tables: of all processes, by rank.

    Returns:
        Names of tensors, by rank.

    Raises:
        CheckpointError: if the parts of a tensor do not make up the whole.

    >>> half = [Held(torch.float32, (4,), (((i, i + 2),),)) for i in (0, 2)]
    >>> both = Held(torch.float32, (9,), (((0, 9),),))
    >>> [sorted(names) for names in assign([{"a": half[0], "b": both}, {"a": half[1], "b": both}])]
    [['a', 'b'], ['a']]
    """
    owners: dict[tuple[str, Region], list[int]] = {}
    known: dict[str, Held] = {}
    for rank, table in enumerate(tables):
        for name, held in table.items():
            first = known.setdefault(name, held)
            if (held.dtype, held.shape) != (first.dtype, first.shape):
                raise CheckpointError(
                    f"checkpoint: {name} is {list(held.shape)} of {held.dtype} on rank {rank}, and "
                    f"{list(first.shape)} of {first.dtype} on another: the ranks train different models"
                )
            if math.prod(sizes(held.region)):
                owners.setdefault((name, held.region), []).append(rank)
    found = dict.fromkeys(known, 0)
    for name, region in owners:
        found[name] += math.prod(sizes(region))
    for name, held in known.items():
        if found[name] != math.prod(held.shape):
            raise CheckpointError(
                f"checkpoint: the ranks hold {found[name]} of the {math.prod(held.shape)} elements of {name}: parts "
                "overlap or are missing"
            )
    return _balanced(owners, known, len(tables))


def _balanced(owners: Mapping[tuple[str, Region], list[int]], known: Table, ranks: int) -> list[set[str]]:
    """First the parts that only one process has, then the largest: each to the process with the least so far."""

    def nbytes(key: tuple[str, Region]) -> int:
        return math.prod(sizes(key[1])) * known[key[0]].dtype.itemsize

    names: list[set[str]] = [set() for _ in range(ranks)]
    loads = [0] * ranks
    for key in sorted(owners, key=lambda key: (len(owners[key]), -nbytes(key), key)):
        rank = min(owners[key], key=lambda each: (loads[each], each))
        names[rank].add(key[0])
        loads[rank] += nbytes(key)
    return names
