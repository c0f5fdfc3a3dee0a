"""A training whose loss has another level in some batches, and the default rules with short windows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from announced import Record
from fits import fit
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import stabletrain as st

AT, STEPS = 60, 130
"""The first batch at the new level, and the batches of an epoch."""
QUICK: dict[str, Any] = {
    "every": 8,
    "trust_after": 4,
    "rewarm": 10,
    "window": 32,
    "delay": 2,
    "min_samples": 16,
    "patience": 6,
    "regime_after": 4,
    "cool_down": 20,
    "check_every": 4,
    "accept": 18,
}


def step_up(batch: int) -> float:
    """The loss is four times as large from batch `AT` on."""
    return 4.0 if batch >= AT else 1.0


class Model(LightningModule):
    """A regression of noisy values that has almost converged; a batch is its number.

    Args:
        factor: on the loss, by the number of the batch.
    """

    def __init__(self, factor: Callable[[int], float] = step_up) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 2)
        nn.init.constant_(self.net.weight, 0.9)
        self.factor = factor
        self.seen: list[int] = []
        self.rates: list[float] = []

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        number = int(batch)
        self.seen.append(number)
        x, noise = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(number))
        loss: Tensor = (self.net(x) - x.sum(1, keepdim=True) - noise[:, :2]).square().mean() + 1.0
        return loss * self.factor(number)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9, fused=True)
        optimizer.register_step_pre_hook(lambda *_: self.rates.append(optimizer.param_groups[0]["lr"]))
        return optimizer


def rules(mode: Any = "exact", max_in_a_row: int = 12, **changes: Any) -> tuple[list[Any], st.Rollback]:
    """The plugins of the default stack that decide, and the rollback among them."""
    rollback = st.Rollback(**{**QUICK, **changes})
    outliers = st.SkipOutliers(window=32, min_samples=16, regime_after=6, max_in_a_row=max_in_a_row)
    return [
        st.ClipZScore(warmup_steps=20),
        outliers,
        st.SkipNonFinite(),
        rollback,
        st.Guard(mode=mode),
        st.ResumeExactly(),
    ], rollback


def train(folder: Path, model: Model, *callbacks: Callback, **options: Any) -> tuple[Trainer, Record]:
    """Train for two epochs by default; the trainer and what happened."""
    record = Record()
    data: Any = DataLoader(range(STEPS), batch_size=None)  # type: ignore[arg-type]
    mine = fit(model, data, *callbacks, record, **{"max_epochs": 2, "default_root_dir": folder, **options})
    return mine, record


class SaveAt(Callback):
    """Saves a checkpoint after each of some batches of the process, counted from 1; last in the list."""

    def __init__(self, folder: Path, *after: int) -> None:
        self.folder, self.after, self.batches = folder, after, 0

    def path(self, after: int) -> Path:
        return self.folder / f"{after}.ckpt"

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches in self.after:
            trainer.save_checkpoint(self.path(self.batches))


def decisions(record: Record) -> list[tuple[int, str]]:
    """Steps and kinds of the events that change the training."""
    kinds = ("rollback", "accept", "rewarm", "stop", "regime")
    return [(event.step, event.kind) for event in record.events if event.kind in kinds]
