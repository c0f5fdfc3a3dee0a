"""Run by two processes: fits under DDP and FSDP2 with a NaN on one rank only; each rank saves what it ended with."""

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fits import Recorder, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from stabletrain import ClipNorm, Guard, SkipNonFinite

NAN_AT = 4
BATCHES = 10


class Net(LightningModule):
    """Rank r of n sees every n-th row of a batch that is a function of its number alone."""

    def __init__(self, shard: bool = False, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        self.shard, self.fused = shard, fused

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
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)


def train(kind: str, mode: str, accumulate: int, devices: int) -> dict[str, Any]:
    strategy: Any = "auto"
    if devices > 1:
        strategy = DDPStrategy() if kind == "ddp" else ModelParallelStrategy(devices, tensor_parallel_size=1)
    module, recorder = Net(shard=kind == "fsdp2" and devices > 1, fused=mode == "device"), Recorder()
    options: dict[str, Any] = {"strategy": strategy, "devices": devices, "accumulate_grad_batches": accumulate}
    mine = trainer(
        recorder, ClipNorm(max_norm=1.0), SkipNonFinite(), Guard(mode=mode), use_distributed_sampler=False, **options
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        mine.fit(module, DataLoader(torch.zeros(BATCHES, 1)))
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    outcomes = [(o.loss, o.grad_norm, o.skipped, o.clipped) for o in recorder.state]
    return {"weights": [w.detach().clone() for w in weights], "outcomes": outcomes, "global_step": mine.global_step}


CASES = [("ddp", "exact", 1), ("ddp", "exact", 2), ("ddp", "device", 1), ("fsdp2", "exact", 1), ("fsdp2", "device", 1)]

if __name__ == "__main__":
    for case in CASES:
        result = train(*case, devices=2)
        torch.save(result, Path(sys.argv[1]) / f"{'-'.join(map(str, case))}-{dist.get_rank()}.pt")
