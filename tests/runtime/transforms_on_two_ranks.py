"""Run by torchrun for test_transforms_distributed.py: trains with each transform, and saves the whole weights."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.utils.data import DataLoader

from stabletrain import ClipTensorwise, ClipUnitwise, ClipValue, SkipNonFinite
from stabletrain.runtime import gradients
from stabletrain.runtime.transform import TransformCallback

BATCHES = 12
NAN_AT = 5
TRANSFORMS: dict[str, Callable[[], TransformCallback]] = {
    "value": lambda: ClipValue(0.05),
    "unitwise": lambda: ClipUnitwise(0.05),
    "tensorwise": lambda: ClipTensorwise(warmup_steps=4, max_norm=0.5),
}


class Net(LightningModule):
    """Rank r of n sees every n-th sample. On two ranks the head's one row and its bias leave a rank with nothing."""

    def __init__(self, shard: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
        self.shard = shard

    def configure_model(self) -> None:
        if self.shard and not isinstance(next(self.net.parameters()), DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(batch_idx))
        if batch_idx == NAN_AT:
            x[1, 0] = torch.nan  # of two ranks only the second one sees it
        x = x[self.global_rank :: self.trainer.world_size] * (10.0 if batch_idx % 4 == 3 else 1.0)
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def train(name: str, folder: Path, strategy: Strategy | str = "auto", devices: int = 1) -> dict[str, Tensor]:
    """The weights, and what the transform remembers, after a fit."""
    clip, module = TRANSFORMS[name](), Net(shard=isinstance(strategy, ModelParallelStrategy))
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[SkipNonFinite(), clip],
    )
    trainer.fit(module, DataLoader(torch.zeros(BATCHES, 1)))
    found = {key: p.full_tensor() if isinstance(p, DTensor) else p for key, p in module.named_parameters()}
    if isinstance(clip, ClipTensorwise):
        found |= {"gammas": clip.state_dict()["state"]["gammas"]}
    return {key: value.detach().clone() for key, value in found.items()}


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
        strategies: dict[str, Strategy] = {
            "ddp": DDPStrategy(process_group_backend="gloo"),
            "fsdp2": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"),
        }
        for key, strategy in strategies.items():
            weights = train(name, folder, strategy, devices=2)
            torch.save(weights, folder / f"{key}-{name}-{os.environ['RANK']}.pt")
    unit_norms_of_shards()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
