"""Small LightningModules, each healthy unless a bug is asked for, and their data."""

from __future__ import annotations

from functools import cache
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

TRAINING = 1400
"""Digits of the training set; the others are for validation."""
Loaders = tuple[Any, Any]
"""A train loader and a validation loader, or None."""


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1797 digits in a fixed order: images (samples, 1, 8, 8) from 0 to 1, and labels."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    images, targets = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return x[order], torch.tensor(targets)[order]


def digit_loaders(
    x: Tensor | None = None,
    y: Tensor | None = None,
    vx: Tensor | None = None,
    vy: Tensor | None = None,
    *,
    batch_size: int = 32,
    shuffle: bool = True,
) -> Loaders:
    """Loaders of the digits.

    Args:
        x: other training images.
        y: other training labels.
        vx: other validation images.
        vy: other validation labels.
        batch_size: of the training.
        shuffle: the training set.
    """
    images, targets = digits()
    x, y = images[:TRAINING] if x is None else x, targets[:TRAINING] if y is None else y
    vx, vy = images[TRAINING:] if vx is None else vx, targets[TRAINING:] if vy is None else vy
    train = DataLoader(TensorDataset(x, y), batch_size, shuffle=shuffle, drop_last=True)
    return train, DataLoader(TensorDataset(vx, vy), 64)


def text_loaders() -> Loaders:
    """Loaders of characters."""
    from stabletrain.workloads import ShakespeareData

    data = ShakespeareData(context=24, batch_size=16)
    data.setup("fit")
    return data.train_dataloader(), data.val_dataloader()


def table_loaders() -> Loaders:
    """A linear function of eight features with noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1200, 8, generator=generator)
    y = x[:, :3].sum(1, keepdim=True) + 0.1 * torch.randn(1200, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), 32, shuffle=True, drop_last=True), None


class Mlp(L.LightningModule):
    """Classifies the digits.

    Args:
        bug: name of the bug; empty: none.
        lr: learning rate.
        norm: with BatchNorm.
        sgd: SGD with momentum instead of Adam.
        inputs: features of a sample.
    """

    def __init__(
        self, bug: str = "", lr: float = 3e-3, *, norm: bool = False, sgd: bool = False, inputs: int = 64
    ) -> None:
        super().__init__()
        self.bug, self.lr, self.sgd = bug, lr, sgd
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(inputs, 64),
            *([nn.BatchNorm1d(64)] if norm else []),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )
        layers = [each for each in self.net if isinstance(each, nn.Linear)]
        if bug == "dead":
            nn.init.constant_(layers[0].bias, -10.0)
        if bug == "init":
            for each in layers:
                nn.init.normal_(each.weight, std=2.0)
        if bug == "frozen":
            layers[0].weight.requires_grad_(False)
        if bug == "eval":
            self.net.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        z: Tensor = self.net(torch.zeros_like(x) if self.bug == "ignores" else x)
        if self.bug == "softmax":
            z = z.softmax(-1)
        if self.bug == "detach":
            z = z.detach() + 0 * self.net[1].bias.sum()
        return F.cross_entropy(z, y, reduction="sum" if self.bug == "sum" else "mean")

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self.bug != "zero_grad":
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if self.bug == "head":
            parameters = parameters[:-2]
        if self.sgd:
            return torch.optim.SGD(parameters, self.lr, momentum=0.9)
        return torch.optim.Adam(parameters, self.lr)


class Regression(L.LightningModule):
    """Fits the table.

    Args:
        squeezed: whether the target has lost its second dimension.
    """

    def __init__(self, squeezed: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        self.squeezed = squeezed

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y.squeeze(1) if self.squeezed else y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Binary(L.LightningModule):
    """Says whether a digit is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.binary_cross_entropy_with_logits(self.net(x)[:, 0], (y % 2).float())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Lstm(L.LightningModule):
    """Predicts the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(84, 32)
        self.lstm = nn.LSTM(32, 48, 2, batch_first=True)
        self.head = nn.Linear(48, 84)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        z = self.head(torch.relu(self.lstm(self.embed(batch[:, :-1]))[0]))
        return F.cross_entropy(z.flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


class Encoder(L.LightningModule):
    """Predicts the next character with nn.TransformerEncoderLayer; its step returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(84, 32)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True) for _ in range(2)])
        self.head = nn.Linear(32, 84)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        x = self.embed(batch[:, :-1])
        for block in self.blocks:
            x = block(x)
        return {"loss": F.cross_entropy(self.head(x).flatten(0, 1), batch[:, 1:].flatten())}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)
