"""The private parts of Lightning that saving checkpoints depends on."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.utils.data import DataLoader

from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.testing.toy import ToyBatches, ToyModule
from stabletrain.testing.trainer import quiet_trainer


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


class Restored(Callback):
    """Records the calls around what is restored."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        def wrap(what: str, restore: Any) -> None:
            self.calls.append(what)
            restore()

        self.undo = trainer_internals.around_restoring(trainer, wrap)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.undo()


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_what_is_restored_is_wrapped(tmp_path: Path) -> None:
    """Bug: a foreign state of a callback, a loop or a scheduler ends in a traceback; or the wrapper stays installed."""
    first = quiet_trainer(max_steps=1)
    first.fit(ToyModule(), DataLoader(ToyBatches(), batch_size=None))
    first.save_checkpoint(tmp_path / "x.ckpt")
    restored = Restored()
    trainer = quiet_trainer(restored, max_steps=1)
    trainer.fit(ToyModule(), DataLoader(ToyBatches(), batch_size=None), ckpt_path=tmp_path / "x.ckpt")
    assert set(restored.calls) == {"data module", "callbacks", "precision", "loops", "learning-rate schedulers"}
    assert not [name for name in vars(trainer._checkpoint_connector) if name.startswith("restore_")]
    states = trainer_internals.loop_states(trainer)
    assert states["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 1
