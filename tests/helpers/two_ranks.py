"""A training that is the same on one rank and on two, for scripts that torchrun runs and tests that compare."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from fits import MakeOptimizer, trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

BATCHES = 12
NAN_AT = 5


def strategy(kind: str) -> Strategy:
    """``"ddp"``, ``"fsdp2"``, ``"hsdp"`` or ``"tp"`` (tensor parallel: all ranks see the same data), on the CPU."""
    size = int(os.environ["WORLD_SIZE"])
    if kind == "tp":
        return ModelParallelStrategy(1, tensor_parallel_size=size, process_group_backend="gloo")
    if kind in ("fsdp2", "hsdp"):
        return ModelParallelStrategy(size, tensor_parallel_size=1, process_group_backend="gloo")
    return DDPStrategy(process_group_backend="gloo")


def shard(module: Any) -> None:
    """Shard ``module.net``, if the strategy has a mesh; a module's ``configure_model``."""
    if module.device_mesh is not None and not isinstance(next(module.net.parameters()), DTensor):
        fully_shard(module.net, mesh=module.device_mesh["data_parallel"])


class Net(LightningModule):
    """Rank r of n sees every n-th row of a batch that is a function of its number alone.

    On two ranks the head's one row and its bias leave a rank with nothing.
    """

    def __init__(self, make_optimizer: MakeOptimizer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
        self.make_optimizer = make_optimizer

    configure_model = shard

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(batch_idx))
        if batch_idx == NAN_AT:
            x[1, 0] = torch.nan  # of two ranks only the second one sees it
        x = x[self.global_rank :: self.trainer.world_size] * (10.0 if batch_idx % 4 == 3 else 1.0)
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make_optimizer(self.parameters())


def train(
    folder: Path,
    kind: str | Strategy | None,
    *callbacks: Callback,
    make_optimizer: MakeOptimizer,
    make: Callable[[MakeOptimizer], Net] = Net,
    ckpt_path: str | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Trainer]:
    """Train on all ranks with a kind of strategy, or on one for None; the whole weights, and the trainer."""
    if kind is not None:
        used = strategy(kind) if isinstance(kind, str) else kind
        options |= {"strategy": used, "devices": int(os.environ["WORLD_SIZE"])}
    module = make(make_optimizer)
    mine = trainer(*callbacks, default_root_dir=folder, use_distributed_sampler=False, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        mine.fit(module, DataLoader(torch.zeros(BATCHES, 1)), ckpt_path=ckpt_path)
    whole = {key: p.full_tensor() if isinstance(p, DTensor) else p for key, p in module.named_parameters()}
    return {key: weight.detach().clone() for key, weight in whole.items()}, mine


def leave() -> NoReturn:
    """End both processes at once, successfully; the last call of a script.

    Gloo's threads may still run when the interpreter ends, and then abort the process ("terminate called without an
    active exception") after everything has been checked and saved: so it does not get there.
    """
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
