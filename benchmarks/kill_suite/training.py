"""The training that is killed: everything that a resume can get wrong is in it, and its checkpoints are large."""

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
import torch._dynamo  # torch imports it at the first optimizer step: here once, instead of in every process
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stabletrain import (  # all of them here: what a forked process imports by itself may have changed meanwhile
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
"""Of the embedding: with both moments of AdamW, which decays every row at every step, a checkpoint has 25 MB."""
WRITES = 12
"""Checkpoints of a whole training, those for the best metric not counted."""
BROKEN = 7
"""This sample's target is NaN: in every epoch there is one step to skip."""
PATIENCE = timedelta(seconds=20)
"""A rank waits so long for one that has gone."""
FORK = get_context("fork")
"""Importing torch and Lightning takes longer than a whole training; nobody has used a thread pool before the fork."""


@dataclass(frozen=True)
class Setup:
    """What differs between trainings.

    Args:
        processes: ranks.
        accumulate: micro-batches of a step; with 3 the last window of an epoch is a short one.
        workers: of the DataLoader.
        monitor: the metric of which the best checkpoint is kept besides; these are saved at the end of a validation.
    """

    processes: int
    accumulate: int
    workers: int
    monitor: str | None


class Samples(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Each sample has noise from the global generators of all three kinds."""

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
    """The plugins of a recipe, quick to act: histories are short, snapshots and checkpoints many."""
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
    """One rank, in a process of its own; leaves all that it has at the end in ``end-<rank>.pt``."""
    with (folder / f"log-{rank}.txt").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    several: dict[str, Any] = {}
    if setup.processes > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
        several = {"strategy": DDPStrategy(process_group_backend="gloo", timeout=PATIENCE)}
    seed_everything(seed, workers=True, verbose=False)
    model, plugins = Model(setup), stack(setup, folder)
    trainer = Trainer(
        accelerator="cpu",
        devices=setup.processes,
        max_epochs=EPOCHS,
        accumulate_grad_batches=setup.accumulate,
        val_check_interval=10,  # within epochs; with accumulation within a window, whose gradients no checkpoint has
        callbacks=plugins,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **several,
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
    """Start all ranks of a training; the processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        FORK.Process(target=train, args=(setup, folder, rank, port, seed, ckpt_path)) for rank in range(setup.processes)
    ]
    for process in processes:
        process.start()
    return processes
