"""The training that is killed: it has every kind of state that a resume must restore, and large checkpoints."""

from __future__ import annotations

import logging
import os
import random
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # otherwise torch imports it in every process, at the first optimizer step
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stabletrain import (  # imported before the fork, since the source files may change during the benchmark
    ClipZScore,
    MonitorGradients,
    ResumeExactly,
    Rollback,
    SaveCheckpoints,
    ScheduleLR,
    SkipNonFinite,
    SkipOutliers,
)
from stabletrain.runtime import rng

BATCHES, BATCH, EPOCHS = 25, 4, 3
ROWS, WIDTH = 1 << 15, 64
"""Size of the embedding, whose rows all change at every step by weight decay; a checkpoint has 25 MB."""
WRITES = 12
"""Number of checkpoints of a whole training, without those for the best metric."""
BROKEN = 7
"""Index of the sample whose target is NaN, so that one step is skipped in every epoch."""
PATIENCE = timedelta(seconds=20)
"""Timeout of collectives, after which a rank whose peer was killed ends."""
FORK = get_context("fork")
"""Processes are forked, because importing torch and Lightning takes longer than a training. No thread pool is used
before the fork."""


@dataclass(frozen=True)
class Setup:
    """The settings in which trainings differ.

    Args:
        processes: number of ranks.
        accumulate: micro-batches per step; with 3 the last window of an epoch is shorter.
        workers: worker processes of the DataLoader.
        monitor: metric whose best checkpoint is retained, too; it is saved at the end of a validation. None: no metric.
    """

    processes: int
    accumulate: int
    workers: int
    monitor: str | None


class Samples(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Each sample contains noise from the global generators of torch, Python and numpy."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = torch.randint(0, ROWS, (size, 4), generator=generator)
        self.targets = torch.randn(size, 1, generator=generator)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        noise = torch.randn(WIDTH) + random.random() + float(np.random.randn())
        return self.rows[index], noise, self.targets[index] * (float("nan") if index == BROKEN else 1.0)


class Model(LightningModule):
    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup_ = setup
        self.embedding = nn.Embedding(ROWS, WIDTH)
        self.net = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.2))
        self.head = nn.Linear(64, 1)

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        rows, noise, targets = batch
        return (self.head(self.net(self.embedding(rows).mean(1) + 0.1 * noise)) - targets).square().mean()

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.log("val", (self.loss(batch) + torch.rand(1)).nan_to_num(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1, fused=True)

    def train_dataloader(self) -> DataLoader[Any]:
        samples = Samples(BATCHES * BATCH * self.setup_.processes)
        return DataLoader(samples, BATCH, shuffle=True, num_workers=self.setup_.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Samples(4 * BATCH), BATCH)


def stack(setup: Setup, folder: Path) -> list[Any]:
    """Return the plugins of a recipe, with short histories and frequent snapshots and checkpoints."""
    return [
        ScheduleLR(kind="cosine"),
        ResumeExactly(),
        ClipZScore(warmup_steps=4),
        SkipNonFinite(),
        SkipOutliers(window=16, min_samples=8, regime_after=4),
        Rollback(every=6, keep=2, trust_after=3),
        MonitorGradients(every=5),
        SaveCheckpoints(folder / "checkpoints", every=6 if setup.accumulate == 1 else 2, monitor=setup.monitor),
    ]


def train(setup: Setup, folder: Path, rank: int, port: int, seed: int, ckpt_path: Path | None) -> None:
    """Train one rank, in its own process; saves its final state as ``end-<rank>.pt``."""
    with (folder / f"log-{rank}.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    distributed: dict[str, Any] = {}
    if setup.processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
        distributed = {"strategy": DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)}
    seed_everything(seed, workers=True, verbose=False)
    model, plugins = Model(setup), stack(setup, folder)
    trainer = Trainer(
        accelerator="cpu",
        devices=setup.processes,
        max_epochs=EPOCHS,
        accumulate_grad_batches=setup.accumulate,
        val_check_interval=10,  # within epochs; with accumulation also within a window, whose gradients are not saved
        callbacks=plugins,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **distributed,
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    end = {
        "weights": model.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "rng": rng.capture(),
        "steps": trainer.global_step,
        "batches": trainer.fit_loop.epoch_loop.total_batch_idx,
        "plugins": {each.state_key: each.state_dict() for each in plugins if not isinstance(each, SaveCheckpoints)},
    }
    torch.save(end, folder / f"end-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def start(setup: Setup, folder: Path, seed: int, ckpt_path: Path | None = None) -> list[Any]:
    """Start all ranks of a training; return their processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        FORK.Process(target=train, args=(setup, folder, rank, port, seed, ckpt_path)) for rank in range(setup.processes)
    ]
    for process in processes:
        process.start()
    return processes
