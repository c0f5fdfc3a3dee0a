"""Run by torchrun for test_transforms_distributed.py: trains with each transform, and saves the whole weights."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

from stabletrain import AddGradientNoise, ClipTensorwise, ClipUnitwise, ClipValue, SkipNonFinite
from stabletrain.runtime import gradients
from stabletrain.runtime.guard.transform import TransformCallback

TRANSFORMS: dict[str, Callable[[], TransformCallback]] = {
    "value": lambda: ClipValue(0.05),
    "unitwise": lambda: ClipUnitwise(0.05),
    "noise": lambda: AddGradientNoise(0.05),
    "tensorwise": lambda: ClipTensorwise(warmup_steps=4, max_norm=0.5),
}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def train(name: str, folder: Path, kind: str | None) -> dict[str, Tensor]:
    """The weights and the transform's state after a fit: on two ranks, or on one for None."""
    clip = TRANSFORMS[name]()
    found, _ = two_ranks.train(folder, kind, SkipNonFinite(), clip, make_optimizer=sgd)
    if isinstance(clip, ClipTensorwise):
        found |= {"gammas": clip.state_dict()["state"]["gammas"].clone()}
    return found


def unit_norms_of_shards() -> None:
    """Every placement gives the norms of whole units: of all of them, or of this rank's rows."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    generator = torch.Generator().manual_seed(0)
    matrix, kernel, vector = (torch.randn(shape, generator=generator) for shape in ((3, 5), (4, 2, 3), (5,)))
    rows = slice(0, 2) if rank == 0 else slice(2, 3)
    expected = {
        "cut by rows": (distribute_tensor(matrix, mesh, [Shard(0)]), matrix.norm(dim=1)[rows]),
        "cut by columns": (distribute_tensor(matrix, mesh, [Shard(1)]), matrix.norm(dim=1)),
        "cut inside": (distribute_tensor(kernel, mesh, [Shard(2)]), kernel.flatten(1).norm(dim=1)),
        "cut vector": (distribute_tensor(vector, mesh, [Shard(0)]), vector.norm().view(1)),
        "one row, one rank empty": (
            distribute_tensor(matrix[:1], mesh, [Shard(0)]),
            matrix[:1].norm(dim=1)[: 1 - rank],
        ),
        "one element, one rank empty": (distribute_tensor(vector[:1], mesh, [Shard(0)]), vector[:1].abs()),
        "replica": (distribute_tensor(matrix.clone(), mesh, [Replicate()]), matrix.norm(dim=1)),
        "pending sum": (DTensor.from_local(matrix / 2, mesh, [Partial()]), matrix.norm(dim=1)),
        "plain": (matrix, matrix.norm(dim=1)),
    }
    tensors, norms = zip(*expected.values(), strict=True)
    torch.testing.assert_close(gradients.unit_norms(tensors), torch.cat(norms))
    factors = torch.full((sum(map(len, norms)),), 0.5)
    gradients.scale_units_(tensors, factors)
    torch.testing.assert_close(gradients.unit_norms(tensors), torch.cat(norms) / 2)


def main(folder: Path) -> None:
    """Train with every transform under both strategies."""
    torch.set_num_threads(1)
    for name in TRANSFORMS:
        for kind in ("ddp", "fsdp2"):
            torch.save(train(name, folder, kind), folder / f"{kind}-{name}-{os.environ['RANK']}.pt")
    unit_norms_of_shards()
    two_ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
