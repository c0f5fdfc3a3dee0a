"""Trainings for tests of checkpoints that move between strategies and numbers of ranks; each step on the same data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fits
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

from stabletrain import ClipZScore, ResumeExactly, SaveCheckpoints, SkipNonFinite

STEPS = 8
CUT = 4


class Net(LightningModule):
    """Rows that do not divide, one replicated 0-d parameter, a tied weight and a buffer.

    Args:
        kind: ``"single"``, ``"ddp"``, ``"zero1"``, ``"fsdp2"``, ``"hsdp"`` or ``"tp"``.
        width: of the hidden layer.
        deeper: with one more layer.
    """

    def __init__(self, kind: str, width: int = 12, deeper: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6), nn.LayerNorm(6), nn.Linear(6, 3))
        self.again = self.net[4]
        if deeper:
            self.net.append(nn.Linear(3, 3))
        self.register_buffer("seen", torch.zeros(()))
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self.net[0].weight, DTensor):
            return
        if self.kind == "tp":
            mesh = self.device_mesh["tensor_parallel"]
            parallelize_module(self.net, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
            return
        mesh = self.device_mesh["data_parallel"]
        if self.kind == "hsdp":
            size = dist.get_world_size()
            mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(int(batch[0])))
        if self.kind != "tp":
            x = x[self.global_rank :: self.trainer.world_size]
        self.seen += 1
        loss = (self.net(x) - x[:, :3]).square().mean()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.losses.append(float(mean))
        return loss

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.dim() > 1]
        others = [p for p in self.parameters() if p.dim() <= 1]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        if self.kind == "zero1":
            from torch.distributed.optim import ZeroRedundancyOptimizer

            optimizer: Any = ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=0.01)
        else:
            optimizer = torch.optim.AdamW(groups, 0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def strategy(kind: str, size: int) -> dict[str, Any]:
    """Arguments of a Trainer."""
    if kind == "single":
        return {"devices": 1}
    if kind in ("ddp", "zero1"):
        # else DDP lays its buckets out anew after the first step of a fit, also of one that resumes, and from three
        # ranks on gloo's sums depend on the place in the bucket
        fixed = {"find_unused_parameters": True} if size > 2 else {}
        return {"devices": size, "strategy": DDPStrategy(process_group_backend="gloo", **fixed)}
    sizes = (1, size) if kind == "tp" else (size, 1)
    return {"devices": size, "strategy": ModelParallelStrategy(*sizes, process_group_backend="gloo")}


def fit(folder: Path, kind: str, size: int, *callbacks: Callback, resume: Any = None, **options: Any) -> Any:
    """Train; the module and the trainer."""
    module = options.pop("make", Net)(kind, options.pop("width", 12), options.pop("deeper", False))
    mine = fits.trainer(
        *callbacks,
        default_root_dir=folder,
        use_distributed_sampler=False,
        **{**strategy(kind, size), "max_steps": STEPS, **options},
    )
    fits.run(mine, module, DataLoader(torch.arange(STEPS), batch_size=1), ckpt_path=resume)
    return module, mine


def save_each(folder: Path, kinds: list[str]) -> dict[str, Any]:
    """Train with each kind of strategy to the end, with a checkpoint in the middle: `_results`."""
    found = {}
    for kind in kinds:
        saver = SaveCheckpoints(folder / f"{kind}-{size_now()}", every=CUT, keep_last=None)
        found[kind] = _results(*fit(folder, kind, size_now(), ResumeExactly(), ClipZScore(), SkipNonFinite(), saver))
    return found


def resume_each(folder: Path, pairs: list[tuple[str, str]]) -> dict[Any, Any]:
    """Resume from a checkpoint, such as ``"ddp-2"``, with a kind of strategy: for each pair of both, `_results`."""
    found = {}
    for source, kind in pairs:
        skip = SkipNonFinite()
        plugins = [ResumeExactly(), ClipZScore(), skip, SaveCheckpoints(folder / "again", every=None)]
        path = folder / source / f"step-{CUT:08d}"
        found[source, kind] = _results(*fit(folder, kind, size_now(), *plugins, resume=path))
        assert skip._guard is not None
        assert skip._guard.counters.attempted == STEPS, "the plugins' state was not restored"
    return found


def save_and_resume(
    folder: Path, kinds: list[str], pairs: list[tuple[str, str]]
) -> tuple[dict[str, Any], dict[Any, Any]]:
    """`save_each`, and `resume_each` for pairs of them, with the same ranks."""
    saved = save_each(folder, kinds)
    return saved, resume_each(folder, [(f"{source}-{size_now()}", kind) for source, kind in pairs])


def size_now() -> int:
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"])


def _results(module: Net, mine: Any) -> dict[str, Any]:
    """Losses, and at the end the whole weights and all of this rank."""
    found = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in module.named_parameters()}
    weights = {name: p.detach().clone() for name, p in found.items()}
    return {"losses": module.losses, "weights": weights, "end": fits.everything(mine)}
