"""A tiny language model and batches with a chosen number of labels, for tests of weights in accumulation windows."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

COUNTS = (3, 30, 7, 17)
ROWS, LENGTH, VOCABULARY = 4, 8, 50


def batch(count: int, number: int) -> dict[str, Tensor]:
    """A batch of 4 rows and 8 positions, of which ``count`` have a label; the others have -100."""
    draw = torch.Generator().manual_seed(number)
    labels = torch.full((ROWS * LENGTH,), -100)
    chosen = torch.randperm(ROWS * LENGTH, generator=draw)[:count]
    labels[chosen] = torch.randint(0, VOCABULARY, (count,), generator=draw)
    x = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=draw)
    return {"x": x, "labels": labels.view(ROWS, LENGTH)}


def batches(*counts: int) -> list[dict[str, Tensor]]:
    return [batch(count, number) for number, count in enumerate(counts)]


def together(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of several."""
    return {key: torch.cat([each[key] for each in parts]) for key in parts[0]}


class Tokens(LightningModule):
    """Predicts labels; the loss is a mean over those that are not -100, or their sum."""

    def __init__(self, reduction: Literal["mean", "sum"] = "mean", fused: bool = False, lr: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Embedding(VOCABULARY, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, VOCABULARY)]
        self.net = nn.Sequential(*layers)
        self.reduction, self.fused, self.lr = reduction, fused, lr

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits, labels = self.net(batch["x"]).flatten(0, 1), batch["labels"].flatten()
        return functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction=self.reduction)

    def configure_optimizers(self) -> Any:
        # torch's fused kernel leaves the momentum uninitialised, if found_inf is set in the first step
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.0 if self.fused else 0.9, fused=self.fused)


def moved(module: LightningModule) -> Tensor:
    """How far all weights are from those of a new module, as one vector."""
    start = dict(Tokens().named_parameters())
    return torch.cat([(p - start[name]).detach().flatten() for name, p in module.named_parameters()])


def error(mine: Tensor, theirs: Tensor) -> float:
    """The relative L2 error."""
    return float((mine - theirs).norm() / theirs.norm())
