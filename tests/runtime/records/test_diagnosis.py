"""The search for the first module whose output is not finite."""

import pytest
from fits import HEALTHY, Batch, Net, batches
from torch import Tensor, nn

from stabletrain.runtime.records.diagnosis import first_nonfinite_output
from stabletrain.testing.trainer import quiet_trainer


class Broken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0.0


class WithoutIndex(Net):
    """Its `training_step` takes the batch alone, which Lightning allows."""

    def training_step(self, batch: Batch) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


@pytest.mark.parametrize("make", [Net, WithoutIndex])
def test_the_first_module_with_a_nonfinite_output_is_named(make: type[Net]) -> None:
    """Bug: a module whose `training_step` takes no ``batch_idx`` makes the search fail, and the report lacks a name."""
    module = make()
    module.net[1] = Broken()
    module.trainer = quiet_trainer()
    assert first_nonfinite_output(module, batches(HEALTHY)[0], 0) == "net.1"
