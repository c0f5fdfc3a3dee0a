"""The default stack sets no learning rate: modules and callbacks that set it train as without plugins, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import everything
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ScheduleLR, default_callbacks
from stabletrain.testing.trainer import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*already exist within another group:UserWarning"),  # BatchNorm is not frozen
]


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = 1e-2
        self.backbone = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh())
        self.net = nn.Linear(16, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(self.backbone(batch[0])), batch[0].sum(1, keepdim=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class SetInHook(Plain):
    def on_train_epoch_start(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.01 * 0.5**self.current_epoch


class SteppedByHand(Plain):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        self.decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return optimizer

    def on_train_epoch_end(self) -> None:
        self.decay.step()


class Rates(Callback):
    """Records the rates of all groups after the last batch of each epoch."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_last_batch:
            self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def train(
    module: LightningModule, folder: Path, *callbacks: Callback, shuffle: bool = True
) -> tuple[list[list[float]], dict[str, Tensor]]:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    rates = Rates()
    mine = quiet_trainer(*callbacks, rates, max_epochs=4, default_root_dir=folder)
    torch.manual_seed(1)
    mine.fit(module, DataLoader(TensorDataset(x), batch_size=4, shuffle=shuffle))
    return rates.seen, everything(mine)


CASES: dict[str, tuple[Callable[[], LightningModule], Callable[[], list[Callback]]]] = {
    "nobody": (Plain, list),
    "a hook of the module": (SetInHook, list),
    "a scheduler stepped by hand": (SteppedByHand, list),
    "weight averaging": (Plain, lambda: [StochasticWeightAveraging(1e-4, swa_epoch_start=1, annealing_epochs=1)]),
    "finetuning": (Plain, lambda: [BackboneFinetuning(1, lambda_func=lambda epoch: 2.0, verbose=False)]),
    "the finder": (Plain, lambda: [LearningRateFinder(num_training_steps=20)]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_default_stack_sets_no_learning_rate(name: str, tmp_path: Path) -> None:
    """Bugs: rates that the module or a callback sets are overwritten after every step; a warm-up nobody asked for."""
    make, others = CASES[name]
    shuffle = name != "the finder"  # its trial steps draw random numbers, in another order with a tape of the batches
    bare_rates, bare = train(make(), tmp_path / "bare", *others(), shuffle=shuffle)
    ours_rates, ours = train(make(), tmp_path / "ours", *others(), *default_callbacks(clip="none"), shuffle=shuffle)
    assert ours_rates == bare_rates
    assert len(bare_rates) >= 4
    assert ours.keys() == bare.keys()
    for key, value in bare.items():
        assert torch.equal(ours[key], value), key


def test_the_default_stack_has_no_schedule_and_logs_the_rate(tmp_path: Path) -> None:
    """Bugs: a schedule in the default stack; `lr` gone from the metrics, since the schedule logged it."""
    stack = default_callbacks()
    assert not [each for each in stack if isinstance(each, ScheduleLR)]
    mine = quiet_trainer(*stack, max_epochs=1, log_every_n_steps=1, default_root_dir=tmp_path)
    mine.fit(SetInHook(), DataLoader(TensorDataset(torch.randn(12, 8)), batch_size=4))
    assert float(mine.callback_metrics["stability/lr"]) == pytest.approx(0.01)
