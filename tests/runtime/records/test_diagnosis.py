"""What is found out about a run that is given up."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from stabletrain.runtime.records.diagnosis import first_nonfinite_output
from stabletrain.testing.trainer import quiet_trainer


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0.0


class Numbered(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), Broken(), nn.Linear(2, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).mean()
        return loss


class WithoutNumber(Numbered):
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


@pytest.mark.parametrize("make", [Numbered, WithoutNumber])
def test_the_first_module_that_is_not_finite(make: type[Numbered]) -> None:
    # catches a probe that fails on modules which do without the batch's number, and then says nothing
    module = make()
    module.trainer = quiet_trainer()
    assert first_nonfinite_output(module, torch.ones(3, 2), 0) == "net.1"
