"""The networks, data and trainers of the cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from baton import Case, Pace
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches made beforehand, so that loading takes no time."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.steps = steps
        self.batches = [
            (torch.randn(4, 8, generator=generator), torch.randn(4, 1, generator=generator)) for _ in range(64)
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batches[i % 64] for i in range(self.steps))

    def __len__(self) -> int:
        return self.steps


class Paced(L.LightningModule):
    """A module that says when a step begins."""

    def __init__(self, pace: Pace | None = None) -> None:
        super().__init__()
        self.pace: Callable[[], None] = pace or (lambda: None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3, foreach=False)


class TinyMLP(Paced):
    """A network so small that the host's work is all that a step takes."""

    def __init__(self, pace: Pace | None = None, log: bool = False, fused: bool = False) -> None:
        super().__init__(pace)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
        self.with_log, self.fused = log, fused

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        self.pace()
        loss = (self.net(batch[0]) - batch[1]).pow(2).mean()
        if self.with_log:
            self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3, fused=self.fused, foreach=False)


class ManyTensors(Paced):
    """A number of small parameters, all with a gradient."""

    def __init__(self, pace: Pace, tensors: int) -> None:
        super().__init__(pace)
        self.all = nn.ParameterList([nn.Parameter(torch.randn(8) * 0.1) for _ in range(tensors)])

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        self.pace()
        return torch.cat(list(self.all)).square().mean() + batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3, foreach=True)


class SixtyMillion(Paced):
    """60 M parameters in 60 tensors, of which a step uses little: the norm and the optimizer take its time."""

    def __init__(self, pace: Pace, tensors: int = 60, width: int = 1000) -> None:
        super().__init__(pace)
        self.all = nn.ParameterList([nn.Parameter(torch.randn(width, width) * 0.01) for _ in range(tensors)])

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        self.pace()
        return torch.stack([p.sum() for p in self.all]).square().mean() * 1e-6 + batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=True)


def fit(module: L.LightningModule, data: Any, callbacks: list[L.Callback], **trainer: Any) -> None:
    """Train without output."""
    options = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "limit_val_batches": 0, **trainer}
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(**options, **quiet, callbacks=callbacks).fit(module, data)


def case(
    callbacks: Callable[[], list[L.Callback]],
    steps: int,
    module: Callable[[Pace], L.LightningModule] = TinyMLP,
    workers: int = 0,
    **trainer: Any,
) -> Case:
    """A fit with these callbacks."""

    def train(pace: Pace) -> None:
        torch.manual_seed(0)
        options = {"multiprocessing_context": "fork"} if workers else {}
        loader = DataLoader(Batches(steps), batch_size=None, num_workers=workers, **options)  # type: ignore[arg-type]
        fit(module(pace), loader, callbacks(), **trainer)

    return train
