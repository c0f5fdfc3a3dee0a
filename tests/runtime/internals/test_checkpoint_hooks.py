"""The private parts of Lightning that saving checkpoints stands on."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from stabletrain.runtime.internals import trainer as trainer_internals

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
]


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.net(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class WeightSample(Callback):
    def __init__(self) -> None:
        self.open: list[bool] = []
        self.batches: list[int] = []
        self.keys: set[str] = set()
        self.lightnings: bool | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.lightnings = trainer_internals.sigterm_is_lightnings(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.open.append(trainer_internals.window_is_open(trainer))
        self.batches.append(trainer_internals.batches_seen(trainer))
        self.keys = set(trainer_internals.dump_checkpoint(trainer))


def fit() -> WeightSample:
    look = WeightSample()
    trainer = Trainer(
        max_epochs=2, accumulate_grad_batches=2, callbacks=[look], logger=False, enable_checkpointing=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Model(), DataLoader(torch.ones(3, 2), batch_size=1))
    return look


def test_windows_batches_and_the_content_of_a_checkpoint() -> None:
    look = fit()
    assert look.open == [True, False, False] * 2  # the last batch of an epoch always steps
    assert look.batches == [1, 2, 3, 4, 5, 6]
    assert {"state_dict", "optimizer_states", "loops", "callbacks", "lr_schedulers", "global_step"} <= look.keys


def test_whose_sigterm_is() -> None:
    assert fit().lightnings is True
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert fit().lightnings is False
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("strategy", "own"), [(SingleDeviceStrategy(), False), (DDPStrategy(), False), (ModelParallelStrategy(), True)]
)
def test_which_strategies_read_and_write_by_themselves(strategy: Any, own: bool) -> None:
    assert trainer_internals.reads_own_checkpoints(SimpleNamespace(strategy=strategy)) is own  # type: ignore[arg-type]
