import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from stabletrain.core.lengths import RunLength
from stabletrain.runtime.run_length import run_length
from stabletrain.testing.trainer import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return itertools.repeat(torch.ones(32))


class Measure(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.length = run_length(trainer, tokens_per_step=64)
        trainer.should_stop = True


def measured(tmp_path: Path, data: Any, *callbacks: Callback, **arguments: Any) -> RunLength:
    measure = Measure()
    trainer = quiet_trainer(measure, *callbacks, default_root_dir=tmp_path, limit_val_batches=0, **arguments)
    trainer.fit(BoringModel(), data)
    return measure.length


@pytest.mark.parametrize(
    ("arguments", "total", "per_epoch"),
    [
        ({"max_epochs": 4}, 40, 10),
        ({"max_epochs": 4, "accumulate_grad_batches": 3}, 16, 4),
        ({"max_epochs": 4, "max_steps": 25}, 25, 10),
        ({"max_epochs": -1, "max_steps": 25}, 25, 10),
        ({"max_epochs": 4, "limit_train_batches": 0.5}, 20, 5),
    ],
)
def test_sized_data(tmp_path: Path, arguments: dict[str, Any], total: int, per_epoch: float) -> None:
    """Bug: a total that ignores max_steps, limits on batches or accumulation."""
    rows = DataLoader(list(torch.ones(20, 32)), batch_size=2)
    assert measured(tmp_path, rows, **arguments) == RunLength(
        total_steps=total, steps_per_epoch=per_epoch, tokens_per_step=64
    )


def test_an_accumulation_that_changes_is_summed_over_the_epochs(tmp_path: Path) -> None:
    """Bug: the window of the first epoch is used for all epochs."""
    rows = DataLoader(list(torch.ones(20, 32)), batch_size=2)
    length = measured(tmp_path, rows, GradientAccumulationScheduler({0: 1, 2: 4}), max_epochs=4)
    assert length.total_steps == 10 + 10 + 3 + 3
    assert math.isclose(length.steps_per_epoch or 0, 6.5)


def test_unsized_data_leave_unknown_what_is_unknown(tmp_path: Path) -> None:
    # Lightning's own estimate is -1 or infinity here, and both make a schedule silently wrong
    endless = DataLoader(Endless(), batch_size=2)
    assert measured(tmp_path, endless, max_steps=7) == RunLength(total_steps=7, tokens_per_step=64)
    assert measured(tmp_path, endless, max_epochs=1, limit_train_batches=3).total_steps == 3
    assert measured(tmp_path, endless, max_time="00:00:01:00").total_steps is None
