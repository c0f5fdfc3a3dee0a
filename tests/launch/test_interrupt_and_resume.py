"""Stopping on a signal so that the run can be resumed, and resuming from a checkpoint that does not fit."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from stabletrain import SaveCheckpoints
from stabletrain.errors import UserError
from stabletrain.launch.checkpoint_mismatch import explain_mismatch
from stabletrain.launch.interrupt import SaveAndStop
from stabletrain.runtime.checkpoints.save_now import find_saver
from stabletrain.runtime.signal_watch import Interrupted, SignalWatch
from stabletrain.testing.toy import ToyBatches, ToyModule
from stabletrain.testing.trainer import quiet_trainer


def data() -> Any:
    return DataLoader(ToyBatches(steps=12), batch_size=None)


def wider() -> ToyModule:
    module = ToyModule()
    module.net = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 2))
    return module


def sgd() -> ToyModule:
    return ToyModule(lambda groups: torch.optim.SGD(_parameters(groups), lr=0.01, momentum=0.9))


def two_groups() -> ToyModule:
    return ToyModule(
        lambda groups: torch.optim.AdamW([{"params": _parameters(groups)[:2]}, {"params": _parameters(groups)[2:]}])
    )


def _parameters(groups: list[dict[str, Any]]) -> list[Any]:
    return [parameter for group in groups for parameter in group["params"]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("first") / "one.ckpt"
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(ToyModule(), data())
    trainer.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wider, r"another model: size mismatch for net\.0\.weight.*\(and 6 more\).*config key model"),
        (sgd, "another optimizer: it has no 'momentum', which SGD needs.*config key optimizer"),
        (two_groups, "another optimizer: .*different number of parameter groups"),
    ],
)
def test_a_checkpoint_of_another_model_is_one_message(
    make: Callable[[], ToyModule], message: str, checkpoint: str
) -> None:
    """Bug: a traceback of torch's, for SGD only at the first step."""
    trainer = quiet_trainer(max_epochs=2)
    explain_mismatch(trainer.strategy, checkpoint)
    with pytest.raises(UserError, match=message) as error:
        trainer.fit(make(), data(), ckpt_path=checkpoint)
    assert "\n" not in str(error.value)
    assert checkpoint in str(error.value)


def test_state_without_a_step_count_does_not_fit_adam(tmp_path: Path) -> None:
    """Bug: a KeyError 'step' from within AdamW, which needs a count of steps that SGD's state does not have."""
    first = quiet_trainer(max_epochs=1)
    first.fit(sgd(), data())
    first.save_checkpoint(tmp_path / "sgd.ckpt")
    trainer = quiet_trainer(max_epochs=2)
    explain_mismatch(trainer.strategy, "sgd.ckpt")
    with pytest.raises(UserError, match="another optimizer: it has no 'step'"):
        trainer.fit(ToyModule(), data(), ckpt_path=tmp_path / "sgd.ckpt")


def test_a_checkpoint_that_fits_is_resumed(checkpoint: str) -> None:
    """Bug: the check for mismatches refuses a checkpoint that fits."""
    trainer = quiet_trainer(max_epochs=2)
    explain_mismatch(trainer.strategy, checkpoint)
    trainer.fit(ToyModule(), data(), ckpt_path=checkpoint)
    assert trainer.global_step == 24


class SignalAt(Callback):
    """Pretends that a signal arrives during a batch."""

    def __init__(self, watch: SignalWatch, batch: int) -> None:
        self.watch, self.batch, self.last = watch, batch, -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.last = batch_idx
        if batch_idx == self.batch:
            self.watch.signum = signal.SIGTERM


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> SignalWatch:
    monkeypatch.setattr(SignalWatch, "install", lambda self: None)
    return SignalWatch()


def test_a_signal_waits_for_the_end_of_the_window(tmp_path: Path, watch: SignalWatch) -> None:
    """Bug: the checkpoint was saved between micro-batches, whose gradients it does not hold."""
    sent = SignalAt(watch, batch=5)
    trainer = quiet_trainer(sent, SaveAndStop(watch, tmp_path), max_epochs=1, accumulate_grad_batches=4)
    with pytest.raises(Interrupted):
        trainer.fit(ToyModule(), data())
    assert sent.last == 7
    assert torch.load(tmp_path / "interrupted.ckpt", weights_only=True)["global_step"] == 2


def test_a_callback_that_saves_on_request_is_used(tmp_path: Path, watch: SignalWatch) -> None:
    """Bug: a second checkpoint in another format beside the callback's, which its retention does not know."""
    saver = SaveCheckpoints(tmp_path / "ours", on_sigterm=False)
    interrupt = SaveAndStop(watch, tmp_path / "other")
    trainer = quiet_trainer(SignalAt(watch, batch=5), saver, interrupt, max_epochs=1, default_root_dir=tmp_path)
    with pytest.raises(Interrupted) as ended:
        trainer.fit(ToyModule(), data())
    assert ended.value.checkpoint == str(tmp_path / "ours" / "step-00000006")
    assert not (tmp_path / "other").exists()


class SavesElsewhere(Checkpoint):
    """A user's checkpoint callback whose `save` is something else."""

    def save(self, path: str) -> None:
        raise AssertionError("called")


def test_only_a_callback_whose_save_can_wait_is_asked() -> None:
    """Bug: calling any method named `save`, with arguments that it does not have."""
    saver = SaveCheckpoints()
    assert find_saver([ModelCheckpoint(), SavesElsewhere()]) is None
    assert find_saver([ModelCheckpoint(), SavesElsewhere(), saver]) is saver


def test_the_second_signal_says_how_many_steps_are_lost(tmp_path: Path, watch: SignalWatch) -> None:
    """Bug: the second Ctrl-C loses steps without a word."""

    class PressTwice(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 9:
                watch._handle(signal.SIGINT, None)
                watch._last_at = 0.0  # as if it was a while ago
                watch._handle(signal.SIGTERM, None)

    saver = ModelCheckpoint(tmp_path / "checkpoints", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = quiet_trainer(saver, PressTwice(), SaveAndStop(watch, tmp_path / "checkpoints"), max_epochs=1)
    lost = "ended by SIGINT without a checkpoint; steps lost since the last checkpoint: 1"
    with pytest.raises(Interrupted, match=lost):
        trainer.fit(ToyModule(), data())


def test_a_deleted_folder_is_said_once(tmp_path: Path, watch: SignalWatch, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: a run whose folder was deleted goes on without a word; or says it at every step; or fails."""
    run = tmp_path / "run"
    run.mkdir()

    class Delete(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            interrupt._look_at = 0.0
            if batch_idx == 3:
                run.rmdir()
            if batch_idx == 6:
                run.mkdir()  # another folder with the same name

    interrupt = SaveAndStop(watch, run / "checkpoints")
    quiet_trainer(Delete(), interrupt, max_epochs=1).fit(ToyModule(), data())
    assert caplog.text.count("has been deleted during the run") == 1
