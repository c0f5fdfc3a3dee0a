"""Run on several ranks: which indices of a DTensor each holds, against torch's own division of the indices."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from stabletrain.runtime.checkpoints.collecting import part_of
from stabletrain.runtime.checkpoints.parts import assign
from stabletrain.runtime.checkpoints.regions import boxes, region_of, sizes, view
from stabletrain.runtime.internals import shards

SHAPES = [(7, 5), (1, 3), (24,), (24, 16), (2, 3, 4)]


def check(folder: Path) -> list[str]:
    """The placements for which a rank finds other elements than it holds, or the ranks do not find all."""
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    cases = [
        (line, [[Shard(0)], [Replicate()], [_StridedShard(0, split_factor=3)]]),
        (line, [[Shard(1)], [_StridedShard(1, split_factor=2)]]),
    ]
    if size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        cases += [
            (square, [[Replicate(), Shard(0)], [Shard(0), Replicate()], [Shard(0), Shard(0)]]),
            (square, [[_StridedShard(0, split_factor=2), Shard(0)], [Shard(0), _StridedShard(0, split_factor=3)]]),
            (square["b"], [[Shard(0)]]),  # each half of the ranks has a mesh and a copy of its own
        ]
    wrong = []
    for mesh, placements in cases:
        for shape in SHAPES:
            for each in placements:
                if not all(_fits(placement, shape, size) for placement in each):
                    continue
                if not _is_right(distribute_tensor(torch.arange(math.prod(shape)).view(shape), mesh, each)):
                    wrong.append(f"{each} of {shape}")
    dist.barrier()
    return wrong


def _fits(placement: Placement, shape: tuple[int, ...], ranks: int) -> bool:
    """Whether there is such a dimension; torch divides with strides only what has no rest."""
    if not isinstance(placement, Shard | _StridedShard):
        return True
    if placement.dim >= len(shape):
        return False
    return isinstance(placement, Shard) or shape[placement.dim] % (placement.split_factor * ranks) == 0


def _is_right(tensor: DTensor) -> bool:
    whole = torch.arange(tensor.numel()).view(tensor.shape)
    region = region_of(shards.held_indices(tensor))
    local = torch.full(sizes(region), -1)
    for box, at in boxes(region):
        view(local, (0,) * local.dim(), at).copy_(view(whole, (0,) * whole.dim(), box))
    again = shards.like(tensor, local)
    held = part_of("a", tensor).held
    tables = [None] * dist.get_world_size()
    dist.all_gather_object(tables, {"a": held})
    assign(tables)  # type: ignore[arg-type]  # raises an error unless the parts make up the whole
    return (
        torch.equal(local, tensor.to_local()) and again.placements == tensor.placements and again.shape == whole.shape
    )
