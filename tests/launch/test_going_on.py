"""Stopping on a signal so that the run can go on, and going on from a checkpoint that does not fit."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch.utils.data import DataLoader, TensorDataset

from stabletrain.errors import UserError
from stabletrain.launch.checkpoint_mismatch import explain_misfits
from stabletrain.launch.interrupt import SaveAndStop
from stabletrain.launch.signals import Interrupted, SignalWatch
from stabletrain.testing.trainer import quiet_trainer


class Net(LightningModule):
    def __init__(self, width: int = 4, make: Any = torch.optim.AdamW, groups: int = 1) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 1))
        self.make, self.groups = make, groups

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        parts = [self.net] if self.groups == 1 else list(self.net)
        return self.make([{"params": list(part.parameters())} for part in parts], lr=0.01)


def data() -> Any:
    return DataLoader(TensorDataset(torch.randn(24, 3)), batch_size=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("first") / "one.ckpt"
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(Net(), data())
    trainer.save_checkpoint(path)
    return str(path)


def sgd(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=0.9)


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: Net(width=5), r"another model: size mismatch for net\.0\.weight.*\(and 2 more\).*config key model"),
        (lambda: Net(make=sgd), "another optimizer: it has no 'momentum', which SGD needs.*config key optimizer"),
        (lambda: Net(groups=2), "another optimizer: .*different number of parameter groups"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_message(net: Any, message: str, checkpoint: str) -> None:
    """Bug: a traceback of torch's, for SGD only at the first step."""
    trainer = quiet_trainer(max_epochs=2)
    explain_misfits(trainer.strategy, checkpoint)
    with pytest.raises(UserError, match=message) as error:
        trainer.fit(net(), data(), ckpt_path=checkpoint)
    assert "\n" not in str(error.value)
    assert checkpoint in str(error.value)


def test_momentum_is_no_step(tmp_path: Path) -> None:
    """Adam wants a count of steps that SGD does not have."""
    first = quiet_trainer(max_epochs=1)
    first.fit(Net(make=sgd), data())
    first.save_checkpoint(tmp_path / "sgd.ckpt")
    trainer = quiet_trainer(max_epochs=2)
    explain_misfits(trainer.strategy, "sgd.ckpt")
    with pytest.raises(UserError, match="another optimizer: it has no 'step'"):
        trainer.fit(Net(), data(), ckpt_path=tmp_path / "sgd.ckpt")


def test_what_fits_goes_on(checkpoint: str) -> None:
    trainer = quiet_trainer(max_epochs=2)
    explain_misfits(trainer.strategy, checkpoint)
    trainer.fit(Net(), data(), ckpt_path=checkpoint)
    assert trainer.global_step == 24


def test_a_signal_waits_for_the_end_of_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the checkpoint was made between micro-batches, whose gradients it does not hold."""
    monkeypatch.setattr(SignalWatch, "install", lambda self: None)
    watch = SignalWatch()

    class Signal(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.last = batch_idx
            if batch_idx == 5:
                watch.received = signal.SIGTERM

    sent = Signal()
    trainer = quiet_trainer(sent, SaveAndStop(watch, tmp_path), max_epochs=1, accumulate_grad_batches=4)
    with pytest.raises(Interrupted):
        trainer.fit(Net(), data())
    assert sent.last == 7
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 2
