"""Functions that run on several ranks: norms of sharded tensors of every kind, and how many collectives they take."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from stabletrain.runtime import gradients


def start() -> None:
    dist.init_process_group("gloo")


def whole_tensors() -> list[Tensor]:
    """Shapes that do not divide, one element, and one row: of some, ranks have nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (1,), (1, 6), (8, 4), (3,), (12, 8), ())
    return [torch.randn(shape, generator=generator) for shape in shapes]


def layouts(size: int) -> dict[str, list[Tensor]]:
    """The whole tensors, distributed in several ways; each list is of one fit."""
    flat = init_device_mesh("cpu", (size,))
    whole = whole_tensors()

    def cut(t: Tensor, mesh: Any, *placements: Any) -> Tensor:
        return distribute_tensor(
            t.clone(), mesh, [p if t.ndim > getattr(p, "dim", -1) else Replicate() for p in placements]
        )

    half = DTensor.from_local(whole[3] / size, flat, [Partial()])
    found = {
        "rows": [cut(t, flat, Shard(0)) for t in whole],
        "columns and rows": [cut(t, flat, Shard(i % 2)) for i, t in enumerate(whole)],
        "replicas": [cut(t, flat, Replicate()) for t in whole],
        "pending": [
            *(cut(t, flat, Shard(0)) for t in whole[:3]),
            half,
            *(cut(t, flat, Replicate()) for t in whole[4:]),
        ],
        "with plain": [t.clone() if i % 2 else cut(t, flat, Shard(0)) for i, t in enumerate(whole)],
        "plain first": [t.clone() if i % 2 == 0 else cut(t, flat, Shard(0)) for i, t in enumerate(whole)],
    }
    if size == 4:
        grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        inner = grid["inner"]
        strided = distribute_tensor(whole[5].clone(), grid, [_StridedShard(0, split_factor=2), Shard(0)])
        found |= {
            "hsdp": [cut(t, grid, Replicate(), Shard(0)) for t in whole],
            "fsdp and tp": [
                *(cut(t, grid, Shard(0), Replicate()) for t in whole[:3]),
                cut(whole[3], grid, Shard(0), Shard(1)),
                cut(whole[4], grid, Shard(0), Shard(0)),
                strided,
                whole[6].clone(),
            ],
            "two meshes": [
                cut(t, *((grid, Shard(0), Shard(0)) if i % 2 else (flat, Shard(0)))) for i, t in enumerate(whole)
            ],
            "mesh of some ranks": [cut(t, inner, Shard(0)) for t in whole],
            "2-d and a part": [
                cut(t, *((grid, Replicate(), Shard(0)) if i % 2 else (inner, Shard(0)))) for i, t in enumerate(whole)
            ],
        }
    return found


def norms(folder: Path) -> dict[str, Any]:
    """For each layout the global norm, the norms of tensors, the norm from the shares of all ranks, and the number of
    collectives of each; with NaN and Inf."""
    start()
    found: dict[str, Any] = {}
    for name, tensors in layouts(dist.get_world_size()).items():
        with CommDebugMode() as of_global:
            norm = gradients.global_norm(tensors)
        with CommDebugMode() as of_tensors:
            each = gradients.tensor_norms(tensors)
        with CommDebugMode() as of_share:
            share = gradients.norm_share(tensors, torch.device("cpu"))
        square = share.square.clone()
        dist.all_reduce(square)
        counts = [each.get_total_counts() for each in (of_global, of_tensors, of_share)]
        found[name] = (norm, each, share.norm(square), counts)
    tensors = layouts(dist.get_world_size())["with plain"]
    found["poisoned"] = poisoned = []
    for i, tensor in enumerate(tensors):
        for position in range(tensor.numel()) if tensor.numel() < 8 else (0, tensor.numel() // 2, tensor.numel() - 1):
            for value in (math.nan, math.inf, -math.inf):
                whole = whole_tensors()[i]
                whole.view(-1)[position] = value
                bad: Tensor = whole
                if isinstance(tensor, DTensor):
                    bad = distribute_tensor(whole, tensor.device_mesh, tensor.placements)
                mixed = [*tensors[:i], bad, *tensors[i + 1 :]]
                poisoned.append((value, float(gradients.global_norm(mixed)), gradients.tensor_norms(mixed)))
    return found


def collectives_of_a_model(folder: Path) -> tuple[int, float, float]:
    """20 tensors that FSDP2 has sharded: collectives of the norm, the norm, and that of the whole gradients."""
    start()
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(10)])
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model(torch.randn(4, 6)).square().mean().backward()
    grads = gradients.of(model.parameters())
    with CommDebugMode() as counted:
        norm = gradients.global_norm(grads)
    whole = [g.full_tensor() for g in grads if isinstance(g, DTensor)]
    return counted.get_total_counts(), float(norm), float(gradients.global_norm(whole))
