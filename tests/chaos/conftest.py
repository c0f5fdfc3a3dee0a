"""A small training that records what a fault may change at each step."""

from typing import Any

import fits
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from stabletrain.testing.checks.equality import same


class Net(fits.Net):
    """Fits integer labels, and records the batches that it gets; four parameters in two linear layers."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__("adamw-fused" if fused else "adamw-foreach", norm=False)
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append([x.clone() for x in batch])
        return (self.net(batch[0]).squeeze(1).float() - batch[1]).square().mean()


class Recorder(Callback):
    """Records what a plugin sees at each optimizer step: gradients before it, weights and learning rate around it."""

    def __init__(self) -> None:
        self.grads: list[list[Tensor]] = []
        self.weights: list[list[Tensor]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.grads.append([p.grad.clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


class Run:
    """A fit, with its trainer, module, data, weights at the end and a record of each step."""

    def __init__(
        self, folder: Any, *callbacks: Callback, batches: int = 8, fused: bool = False, **options: Any
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batches * 4, 6, generator=generator)
        y = torch.randint(0, 3, (batches * 4,), generator=generator)
        self.data = (x, y)
        self.module, self.record = Net(fused), Recorder()
        loader = DataLoader(TensorDataset(x, y), batch_size=4)
        self.trainer = fits.fit(self.module, loader, *callbacks, self.record, default_root_dir=folder, **options)
        self.weights = [p.detach().clone() for p in self.module.parameters()]

    def grads_differ(self, other: "Run") -> list[int]:
        """Steps whose gradients differ."""
        pairs = zip(self.record.grads, other.record.grads, strict=True)
        return [t for t, (mine, theirs) in enumerate(pairs) if not same(mine, theirs)]


@pytest.fixture
def train(tmp_path: Any) -> Any:
    """Trains in a temporary folder: ``train(*callbacks, **options)``."""
    return lambda *callbacks, **options: Run(options.pop("folder", tmp_path), *callbacks, **options)
