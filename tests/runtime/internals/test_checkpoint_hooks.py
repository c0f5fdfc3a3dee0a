"""The private parts of Lightning that saving checkpoints depends on."""

import signal
from types import SimpleNamespace
from typing import Any

import pytest
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from stabletrain.runtime.internals import trainer as trainer_internals


class Observer(Callback):
    """Records what `trainer_internals` returns while a fit runs."""

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


def observed() -> Observer:
    """What was observed in a fit of 2 epochs of 3 batches, with 2 batches a window."""
    observer = Observer()
    fit(Net(), batches(*[HEALTHY] * 3), observer, max_epochs=2, accumulate_grad_batches=2)
    return observer


def test_windows_batches_and_the_content_of_a_checkpoint() -> None:
    """Bugs: a window is open at an epoch's end; batches are counted per epoch; a checkpoint lacks its loops."""
    seen = observed()
    assert seen.open == [True, False, False] * 2  # the last batch of an epoch always steps
    assert seen.batches == [1, 2, 3, 4, 5, 6]
    assert {"state_dict", "optimizer_states", "loops", "callbacks", "lr_schedulers", "global_step"} <= seen.keys


def test_whose_sigterm_is() -> None:
    """Bug: a handler that the user's script has installed is replaced by ours."""
    assert observed().lightnings is True
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert observed().lightnings is False
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("strategy", "own"), [(SingleDeviceStrategy(), False), (DDPStrategy(), False), (ModelParallelStrategy(), True)]
)
def test_which_strategies_read_and_write_by_themselves(strategy: Any, own: bool) -> None:
    """Bug: our checkpoint format is used with a strategy that writes a folder of its own shards."""
    assert trainer_internals.reads_own_checkpoints(SimpleNamespace(strategy=strategy)) is own  # type: ignore[arg-type]
