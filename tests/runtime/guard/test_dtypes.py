"""Models in double, half and complex precision train with every plugin that computes a norm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ClipTensorwise, ClipUnitwise, ClipValue, Rollback, default_callbacks
from stabletrain.runtime.records import diagnosis
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.rollback.weight_check import WeightCheck

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


class Spectral(LightningModule):
    """Real and complex parameters in one model."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out = nn.Linear(8, 8), nn.Linear(5, 1)
        self.mix = nn.Parameter(torch.randn(8, 5, dtype=torch.complex64))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch[0]
        hidden = self.norm(x) if self.trainer.precision == "bf16-true" else (self.norm(x).to(self.mix.dtype) @ self.mix)
        loss = (self.out(hidden.abs()[:, :5].to(self.out.weight.dtype)) - x.sum(1, keepdim=True)).square().mean()
        return loss * math.nan if batch_idx == 7 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


@pytest.mark.filterwarnings("ignore:.*Casting complex values to real:UserWarning")
@pytest.mark.filterwarnings("ignore:.*Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-true"])
def test_every_plugin_works_in_every_precision(precision: Any, tmp_path: Path) -> None:
    """Bug: the weight check, or clamping, raises an error for a dtype that torch trains."""
    stack = default_callbacks(clip="zscore", spike="none", gradients="monitor")
    extra = [
        ClipTensorwise(warmup_steps=2),
        ClipUnitwise(),
        ClipValue(0.5),
        Rollback(check_every=2, every=4, trust_after=1),
    ]
    mine = quiet_trainer(
        *stack, *extra, max_epochs=2, precision=precision, log_every_n_steps=1, default_root_dir=tmp_path
    )
    module = Spectral()
    mine.fit(module, DataLoader(TensorDataset(torch.randn(40, 8)), batch_size=4))
    assert mine.callback_metrics["skipped"] == 2.0
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    names = {row["parameter"] for row in diagnosis.layer_norms(module)}
    assert names == {name for name, _ in module.named_parameters()}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.complex64, torch.complex128, torch.float16, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("position", [0, 3])
def test_the_weight_check_finds_damage_in_every_dtype(dtype: torch.dtype, position: int) -> None:
    """Bugs: an error for the dtype; complex weights that are left out; NaN only in an imaginary part."""
    weights = [torch.ones(4, dtype=torch.float64).to(dtype), torch.ones(2)]
    check = WeightCheck(zip("ab", weights, strict=True), 10.0)
    then = check.norms()
    assert then == pytest.approx((2.0, math.sqrt(2.0)))
    weights[0][position] = complex(0.0, math.nan) if dtype.is_complex else math.nan
    assert "norm of a is nan" in (check.problem(check.norms(), then) or "")
