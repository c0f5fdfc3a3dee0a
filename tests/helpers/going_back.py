"""Trainings with dropout, random data and every kind of state, and a callback that restores snapshots."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torchmetrics
from fits import adamw_8bit, assert_same, everything, scaler
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from stabletrain.runtime.data.train_loader import TrainLoader
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain.testing.trainer import quiet_trainer

SAMPLES, BATCH = 64, 4
Sample = tuple[Tensor, Tensor, int]


class Samples(Dataset[Sample]):
    """A regression; `noise` is drawn from the global generators of torch, numpy and Python."""

    def __init__(self, noise: float = 0.0, size: int = SAMPLES) -> None:
        self.x = torch.randn(size, 8, generator=torch.Generator().manual_seed(1))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Sample:
        x = self.x[index]
        if self.noise:
            x = x + self.noise * (torch.randn(8) + float(np.random.rand()) + random.random())
        return x, x.sum().reshape(1), index


class Stream(IterableDataset[Sample]):
    """The same without a length."""

    def __init__(self, noise: float = 0.0) -> None:
        self.samples = Samples(noise)

    def __iter__(self) -> Iterator[Sample]:
        return (self.samples[i] for i in range(len(self.samples)))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2),
    "fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "tensor-lr": lambda p: torch.optim.AdamW(p, torch.tensor(1e-2), capturable=False, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9),
    "adamw-8bit": lambda p: adamw_8bit(p, 1e-2),
    "lbfgs-like": lambda p: Moving(p),
}


class Moving(torch.optim.Optimizer):
    """Makes new state tensors at every step, in a list, as out-of-place optimizers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for p in group["params"]:
                past = self.state[p].get("past", [])
                self.state[p]["past"] = [*past[-2:], p.grad.clone()]
                self.state[p]["count"] = self.state[p].get("count", 0) + 1
                p.sub_(group["lr"] * torch.stack(self.state[p]["past"]).mean(0))
        return loss


class Model(LightningModule):
    """Dropout, batch normalisation, a scheduler, a metric and epoch averages; records every batch and loss."""

    def __init__(self, optimizer: str = "adamw", dropout: float = 0.3, scheduler: str | None = "step") -> None:
        super().__init__()
        layers = [nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 1)]
        self.net = nn.Sequential(*layers)
        self.seen_mean = torchmetrics.MeanMetric()
        self.optimizer, self.scheduler = optimizer, scheduler
        self.rows: list[tuple[Any, ...]] = []
        self.validated: list[float] = []
        self.averages: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, index = batch
        loss = (self.net(x).float() - y).square().mean()
        self.seen_mean.update(loss.detach())
        self.log("mean_loss", loss, on_step=False, on_epoch=True, batch_size=len(x))
        rate = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.rows.append((self.trainer.global_step, batch_idx, tuple(index.tolist()), rate, loss.item()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.validated.append(loss.item())
        self.log("val_loss", loss, batch_size=len(batch[0]))

    def on_train_epoch_end(self) -> None:
        self.averages.append(self.trainer.callback_metrics.get("mean_loss", torch.tensor(0.0)).item())

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if self.scheduler is None:
            return optimizer
        warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
        then = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
        both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, then], [5])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": both, "interval": self.scheduler}}


class GoBack(GuardMember):
    """Captures a snapshot every few batches, and restores the older of the last two at given batches.

    Args:
        every: batches from one snapshot to the next.
        at: batch ends at which to restore, counted from 1 over the whole process, repeated batches included.
        exclude: number of the last batches to exclude at a restore.
        rewind: whether the data position is restored.
        make: makes an empty snapshot.
    """

    def __init__(
        self,
        every: int,
        at: tuple[int, ...],
        exclude: int = 0,
        rewind: bool = True,
        make: Callable[[], Snapshot] = Snapshot,
    ) -> None:
        self.every, self.at, self.exclude, self.rewind, self.make = every, at, exclude, rewind, make
        self.batches = self.went_back = 0
        self.snapshots: list[Snapshot] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.loader = TrainLoader.of(trainer)
        self.loader.keep_tape()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.loader.close()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        assert self._guard is not None
        self.batches += 1
        if self.batches in self.at and self.snapshots:
            snapshot = self.snapshots[0]
            items = list(self.loader.batches_since(snapshot.mark))  # type: ignore[arg-type]
            dropped = frozenset(items[len(items) - self.exclude :])
            snapshot.restore(self._guard, self.loader, "rollback", dropped, self.rewind)
            self.snapshots = [snapshot]
            self.went_back += 1
        elif self.batches % self.every == 0 and not trainer_internals.window_is_open(trainer):
            self.snapshots = [*self.snapshots[-1:], self.make()]
            self.snapshots[-1].capture(self._guard, self.loader)
            self.loader.forget_before(self.snapshots[0].mark)  # type: ignore[arg-type]


class Steps(DummyLogger):
    """Records the steps at which Lightning logs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:  # type: ignore[override]
        if step is not None:
            self.steps.append(step)


@dataclass
class Case:
    """The options of a training."""

    optimizer: str = "adamw"
    fp16: bool = False
    noise: float = 0.0
    stream: bool = False
    shuffle: bool = False
    workers: int = 0
    validation: bool = False
    dropout: float = 0.3
    missing: tuple[int, ...] = ()
    trainer: dict[str, Any] = field(default_factory=dict)

    def fit(self, *callbacks: Callback) -> tuple[Model, Trainer, Steps]:
        """Train, always from the same seed."""
        seed_everything(0, verbose=False)
        model, logger = Model(self.optimizer, self.dropout), Steps()
        options: dict[str, Any] = {"max_epochs": 2, **self.trainer}
        if self.fp16:
            options["plugins"] = [scaler(init_scale=2.0**16)]
        if not self.validation:
            options["limit_val_batches"] = 0
        trainer = quiet_trainer(*callbacks, logger=logger, log_every_n_steps=1, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(model, self.loader(), DataLoader(Samples(size=8), BATCH) if self.validation else None)
        return model, trainer, logger

    def loader(self) -> DataLoader[Sample]:
        """The training data."""
        if self.stream:
            return DataLoader(Stream(self.noise), BATCH)
        data = Samples(self.noise)
        if self.missing:
            indices = [i for i in range(SAMPLES) if i // BATCH not in self.missing]
            return DataLoader(data, BATCH, sampler=indices)
        return DataLoader(data, BATCH, shuffle=self.shuffle, num_workers=self.workers)


def state_of(model: Model, trainer: Trainer) -> dict[str, Tensor]:
    """`everything` of the trainer, the metric and torch's random generator."""
    return everything(trainer) | {"metric": model.seen_mean.mean_value.clone(), "rng": torch.get_rng_state()}


def compare(reference: tuple[Model, Trainer, Steps], other: tuple[Model, Trainer, Steps], rng: bool = True) -> None:
    """Both runs end with the same bits and made the same steps, and logged steps never decrease."""
    mine, theirs = state_of(*reference[:2]), state_of(*other[:2])
    if not rng:
        del mine["rng"], theirs["rng"]
    assert_same(mine, theirs)
    last: dict[Any, Any] = {}  # of batches that came twice, the second
    for row in other[0].rows:
        last[row[0], row[1]] = row
    final = [last[row[0], row[1]] for row in reference[0].rows]
    assert final == reference[0].rows, "the last pass over a step is not the reference's"
    assert other[0].averages[-1] == reference[0].averages[-1], "epoch averages count steps twice"
    if reference[0].validated:
        assert other[0].validated[-2:] == reference[0].validated[-2:]
    assert other[2].steps == sorted(other[2].steps), "logged steps decrease"
