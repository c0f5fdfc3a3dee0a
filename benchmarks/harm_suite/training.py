"""A small healthy training: its module, its data, its length, and how well the trained module does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

Loss = Callable[["Task", list[Tensor]], Tensor]


class Task(L.LightningModule):
    """A module made of a net, a loss and an optimizer.

    Args:
        net: trained by ``loss``.
        loss: returns the loss of a batch, given the task (for its net and its ``global_step``) and the batch.
        optimizer: returns what ``configure_optimizers`` returns, given the task; default: AdamW at a rate of 3e-3.
    """

    def __init__(self, net: nn.Module, loss: Loss, optimizer: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__()
        self.net, self.loss, self.optimizer = net, loss, optimizer

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self, batch)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self) if self.optimizer else torch.optim.AdamW(self.parameters(), lr=3e-3)


@dataclass
class Training:
    """A training that is about to start.

    Args:
        task: the module.
        data: its train loader.
        steps: attempted optimizer steps; a run with skipped steps sees as many batches as one without.
        metric: of the trained module on held-out data, or on known truth; lower is better. It draws no global random
            numbers.
        least: a metric that is worse by less than this is no harm; about a tenth of what a bare run reaches, or what
            its user would not notice. Chosen from bare runs alone.
        options: further arguments of the Trainer.
    """

    task: Task
    data: DataLoader
    steps: int
    metric: Callable[[Task], float]
    least: float
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A kind of healthy training.

    Args:
        make: makes it anew, given the seed of weights and data.
        is_held_out: kept for acceptance, see `harm_suite.cases.held_out`.
    """

    make: Callable[[int], Training]
    is_held_out: bool = False

    @property
    def name(self) -> str:
        """Name in the record and the table."""
        return self.make.__name__

    @property
    def text(self) -> str:
        """What is unusual about it and what is measured."""
        return " ".join((self.make.__doc__ or "").split())


def cases(*makes: Callable[[int], Training], held_out: bool = False) -> Sequence[Case]:
    """Return a case for each function."""
    return tuple(Case(make, held_out) for make in makes)


def adamw(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a maker of AdamW with this learning rate."""
    return lambda task: torch.optim.AdamW(task.parameters(), lr=rate)
