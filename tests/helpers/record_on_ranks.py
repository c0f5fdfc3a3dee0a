"""Fits on several ranks with and without a record of their start."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
import two_ranks
from lightning.pytorch import Callback, LightningModule, Trainer

from stabletrain.tracking.start_record import StartRecord, record_start


class RecordStart(Callback):
    """Records the start at the first batch, which is made another one on one rank.

    Args:
        other_rank: whose batch is another one; -1: none.
    """

    def __init__(self, other_rank: int = -1) -> None:
        self.other_rank = other_rank
        self.start: StartRecord | None = None
        self.batches = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.batches == 0:
            shown = batch + 1 if trainer.global_rank == self.other_rank else batch
            self.start = record_start(trainer, shown)
        self.batches += 1


def train(folder: Path, kind: str) -> dict[str, Any]:
    """Train three times; what was recorded, and whether the weights are those of a fit without a record."""
    make = partial(torch.optim.AdamW, lr=0.01)
    plain, _ = two_ranks.train(folder, kind, make_optimizer=make, max_steps=3)
    found: dict[str, Any] = {}
    for name, other_rank in {"same": -1, "other": 1}.items():
        recorder = RecordStart(other_rank)
        weights, _ = two_ranks.train(folder, kind, recorder, make_optimizer=make, max_steps=3)
        found[name] = None if recorder.start is None else recorder.start.data
        found[f"{name} weights"] = all(torch.equal(weights[key], plain[key]) for key in plain)
    return found


class OnRankZero(Callback):
    """As a logger that only rank 0 has: it records alone."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and batch_idx == 0:
            self.start = record_start(trainer, batch, alone=True)


def alone(folder: Path, kind: str) -> dict[str, Any] | None:
    """The data that rank 0 records alone, with a validation before, after which FSDP2 keeps weights whole."""
    recorder = OnRankZero()
    make = partial(torch.optim.AdamW, lr=0.01)
    two_ranks.train(folder, kind, recorder, make_optimizer=make, max_steps=3)
    return recorder.start.data if int(os.environ["RANK"]) == 0 and recorder.start is not None else None


def two_nodes(folder: Path) -> dict[str, Any] | None:
    """A run of two nodes with one process each, on one machine; the second has another number of threads."""
    rank = int(os.environ["RANK"])
    os.environ |= {
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GROUP_RANK": str(rank),
        "OMP_NUM_THREADS": str(rank + 1),
    }
    torch.set_num_threads(rank + 1)
    recorder = RecordStart()
    make = partial(torch.optim.AdamW, lr=0.01)
    options = {"devices": 1, "num_nodes": 2, "strategy": two_ranks.strategy("ddp")}
    module = two_ranks.Net(make)
    trainer = two_ranks.trainer(recorder, default_root_dir=folder, use_distributed_sampler=False, **options)
    trainer.fit(module, torch.utils.data.DataLoader(torch.zeros(2, 1)))
    return None if recorder.start is None else recorder.start.environment
