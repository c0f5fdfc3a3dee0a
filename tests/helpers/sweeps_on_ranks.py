"""A range test and a sweep's trial on several ranks; run by `rank_pool.on_ranks`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from fits import OPTIMIZERS
from torch import Tensor
from two_ranks import BATCHES, Net, train

from stabletrain.launch.pruning import PruneTrial
from stabletrain.runtime.records.lr_range_file import read_lr_range
from stabletrain.runtime.records.run_files import LR_RANGE
from stabletrain.runtime.stop import TrainingStopped
from stabletrain_plugins.schedule_lr.lr_range import LRRange


def range_test(folder: Path) -> tuple[int, list[float], dict[str, Tensor]]:
    """Steps, the recorded losses (on the first rank), and the weights, of a test that ends early."""
    rank = os.environ["RANK"]
    weights, trainer = train(
        folder / rank,
        "ddp",
        LRRange(1e-3, 1e4, 60),
        make_optimizer=OPTIMIZERS["adamw-loop"],
        max_epochs=6,
        max_steps=60,
    )
    points = read_lr_range(folder / rank / LR_RANGE)
    return trainer.global_step, [point.loss for point in points], weights


class Validated(Net):
    """Its objective differs on the ranks; only the first rank's counts."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", float("nan") if self.global_step > 4 and self.global_rank == 0 else 1.0, sync_dist=False)

    def val_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(2, 1))


def trial(folder: Path) -> str:
    """Why the trial was stopped."""
    prune = PruneTrial(storage=f"sqlite:///{folder}/gone/optuna.db", study="s", trial=1, metric="val/loss")
    try:
        train(
            folder, "ddp", prune, make_optimizer=OPTIMIZERS["adamw-loop"], make=Validated,
            limit_val_batches=1, val_check_interval=3, max_epochs=BATCHES,
        )  # fmt: skip
    except TrainingStopped as stopped:
        return stopped.reason
    return "not stopped"
