"""A small training whose every step can be looked at."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain.testing.trainer import quiet_trainer


class Net(LightningModule):
    """Classifies rows of numbers; keeps the batches and losses that it saw."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.fused = fused
        self.batches: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches.append([x.clone() for x in batch])
        return nn.functional.cross_entropy(self.body(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, fused=self.fused)


class Watch(Callback):
    """What a plugin sees at each optimizer step: gradients before it, weights and learning rate around it."""

    def __init__(self) -> None:
        self.grads: list[list[Tensor]] = []
        self.weights: list[list[Tensor]] = []
        self.rates: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.parameters()])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.grads.append([p.grad.clone() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))


class Run:
    """One fit, and what was left of it."""

    def __init__(self, folder: Any, *callbacks: Callback, batches: int = 8, **options: Any) -> None:
        ckpt_path, fused = options.pop("ckpt_path", None), options.pop("fused", False)
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batches * 4, 4, generator=generator)
        y = torch.randint(0, 3, (batches * 4,), generator=generator)
        self.data = (x, y)
        self.module, self.watch = Net(fused), Watch()
        options = {"max_epochs": 1, "default_root_dir": folder, "log_every_n_steps": 1, **options}
        self.trainer = quiet_trainer(*callbacks, self.watch, **options)
        self.trainer.fit(self.module, DataLoader(TensorDataset(x, y), batch_size=4), ckpt_path=ckpt_path)
        self.weights = [p.detach().clone() for p in self.module.parameters()]

    def grads_differ(self, other: "Run") -> list[int]:
        """Steps whose gradients differ."""
        return [t for t, pair in enumerate(zip(self.watch.grads, other.watch.grads, strict=True)) if not same(*pair)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)) for a, b in zip(first, second, strict=True))


@pytest.fixture
def train(tmp_path: Any) -> Any:
    """Trains in a temporary folder: ``train(*callbacks, **options)``."""
    return lambda *callbacks, **options: Run(options.pop("folder", tmp_path), *callbacks, **options)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    import warnings

    with warnings.catch_warnings():
        for text in (
            ".*does not have many workers",
            ".*your dataloader is not resumable",
            ".*callbacks used to create",
        ):
            warnings.filterwarnings("ignore", message=text)
        yield
