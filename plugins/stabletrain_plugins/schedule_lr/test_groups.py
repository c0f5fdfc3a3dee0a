"""Groups that come to the optimizer, or leave it, during training follow the curve from their own base rate."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import SaveAfter, assert_same, everything
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ResumeExactly, ScheduleLR, SkipNonFinite
from stabletrain.testing.trainer import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*already exist within another group:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is not resumable:UserWarning"),
]


class Two(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self.head(self.backbone(batch[0])) - batch[0].sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


class Rates(Callback):
    """The rates of all groups within each step."""

    def __init__(self) -> None:
        self.rows: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.rows.append([group["lr"] for group in optimizer.param_groups])


def train(*callbacks: Callback, **options: Any) -> Any:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    mine = quiet_trainer(*callbacks, max_epochs=4)
    mine.fit(Two(), DataLoader(TensorDataset(x), batch_size=4), **options)
    return mine


class ComeAndGo(Callback):
    """A second group from step 8 on; from step 16 on it is the only one."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = trainer.optimizers[0]
        if trainer.current_epoch == 0:
            del optimizer.param_groups[0]["params"][:2]
        elif trainer.current_epoch == 1:
            optimizer.add_param_group({"params": list(pl_module.backbone.parameters()), "lr": 0.05})
        elif trainer.current_epoch == 2:
            del optimizer.param_groups[0]


@pytest.mark.parametrize("guarded", [False, True])
def test_each_group_follows_the_curve_from_its_own_base(guarded: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """Bugs: an error when a group is gone; a group that gets the base of another one."""
    monkeypatch.chdir(tmp_path)
    schedule, rates = ScheduleLR("linear", lr_warmup=0), Rates()
    train(ComeAndGo(), schedule, *([SkipNonFinite()] if guarded else []), rates)
    bases = [[0.1]] * 8 + [[0.1, 0.05]] * 8 + [[0.05]] * 16
    assert rates.rows == [[base * schedule.factor(i) for base in row] for i, row in enumerate(bases)]


def test_a_resumed_run_has_the_same_rates(tmp_path: Path, monkeypatch: Any) -> None:
    """Bug: the base of a group that was added is read from the checkpoint, where the curve has lowered it."""
    monkeypatch.chdir(tmp_path)

    def callbacks(batch: int) -> list[Callback]:
        unfreeze = BackboneFinetuning(1, lambda_func=lambda epoch: 1.0, backbone_initial_lr=0.05, verbose=False)
        return [unfreeze, ScheduleLR("linear", lr_warmup=0), ResumeExactly(), SaveAfter(batch, Path(f"{batch}.ckpt"))]

    rates, again = Rates(), Rates()
    reference = train(*callbacks(15), rates)
    resumed = train(*callbacks(99), again, ckpt_path="15.ckpt")
    assert again.rows == rates.rows[16:]
    assert all(len(row) == 2 for row in again.rows)
    assert_same(everything(resumed), everything(reference))
