from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabletrain.runtime.guard.callbacks import as_callback
from stabletrain.runtime.stop import TrainingStopped
from stabletrain_plugins.skip_outliers.rule import SkipOutliersRule

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
SkipOutliers: Any = as_callback(SkipOutliersRule)


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.net(batch[:, :4]) - batch[:, 4:]).square().mean() + 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(batches: list[Tensor], folder: Path, *callbacks: Any) -> dict[str, Tensor]:
    module = Net()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module.state_dict()


def make_batches(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 5, generator=generator) for _ in range(steps)]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_garbage_batch_is_as_if_it_had_not_been_seen(tmp_path: Path) -> None:
    batches = make_batches(60)
    plain = fit(batches, tmp_path)
    rule = {"window": 32, "min_samples": 16}
    assert equal(plain, fit(batches, tmp_path, SkipOutliers(**rule)))
    garbage = torch.randn(16, 5, generator=torch.Generator().manual_seed(2)) * 100
    assert equal(plain, fit([*batches[:40], garbage, garbage, *batches[40:]], tmp_path, SkipOutliers(**rule)))


def test_lasting_garbage_is_a_clean_stop(tmp_path: Path) -> None:
    batches = make_batches(40) + [100 * batch for batch in make_batches(20)]
    with pytest.raises(TrainingStopped, match="8 outliers in a row"):
        fit(batches, tmp_path, SkipOutliers(window=32, min_samples=16, regime_after=4, max_in_a_row=8))


def test_the_preset_is_a_callback_too() -> None:
    callback = SkipOutliers.olmo(name="mine")
    assert isinstance(callback, SkipOutliers)
    assert (callback.state_key, callback.robust) == ("mine", False)
