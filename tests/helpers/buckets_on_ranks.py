"""Fits under DDP on three ranks that are stopped and resumed, and what is read of DDP's buckets."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fits import SaveAfter, everything, run, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ResumeExactly, SaveCheckpoints
from stabletrain.runtime.internals import ddp_buckets

SMALL = {"bucket_cap_mb": 0.003}
"""About 3 kB: one layer of `Net` in each bucket."""


class Net(LightningModule):
    """Gradients become ready in an order which is neither that of registration nor its reverse.

    Args:
        double: whether one layer has float64 parameters, which need buckets of their own.
    """

    def __init__(self, double: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(24, 24) for _ in range(4))
        if double:
            self.a.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.d(torch.tanh(self.b(x))))
        return self.c(torch.tanh(self.a(x.to(self.a.weight.dtype))).float())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[0].flip(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


def train(
    folder: Path, options: dict[str, Any], save: int | None = None, resume: Path | None = None, **more: Any
) -> tuple[dict[str, Tensor], list[str]]:
    """Train for 12 batches; weights and optimizer state, and the warnings of ResumeExactly.

    Args:
        folder: of the checkpoint.
        options: of DDPStrategy.
        save: after which batch to save ``<batch>.ckpt``, from 0.
        resume: a checkpoint to resume from.
        more: ``double``, ``accumulate``, ``plain`` (without ResumeExactly).
    """
    data = torch.randn(12 * 3 * 4, 24, generator=torch.Generator().manual_seed(1))
    callbacks: list[Any] = [] if more.get("plain") else [ResumeExactly()]
    if save is not None:
        callbacks.append(SaveAfter(save, folder / f"{save}.ckpt"))
    mine = trainer(
        *callbacks,
        strategy=DDPStrategy(process_group_backend="gloo", **options),
        devices=dist.get_world_size() if dist.is_initialized() else 3,
        accumulate_grad_batches=more.get("accumulate", 1),
        default_root_dir=folder,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(mine, Net(more.get("double", False)), DataLoader(TensorDataset(data), 4, shuffle=True), ckpt_path=resume)
    return everything(mine), [str(each.message) for each in caught if "resume_exactly" in str(each.message)]
