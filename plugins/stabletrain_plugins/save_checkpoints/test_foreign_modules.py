"""Modules that nobody here wrote: EarlyStopping over restarts, and objects among the hyper-parameters."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabletrain import SaveCheckpoints
from stabletrain.runtime.checkpoints import load

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*is already saved during checkpointing"),
]


class Forecaster(LightningModule):
    """As those of pytorch-forecasting: saves objects, sets them again when it resumes, and has a config and a path."""

    def __init__(self, cfg: Any, data: Any = None, loss: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.loss = loss
        self.net = nn.Linear(cfg.net.width, 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["__special_save__"] = {"loss": self.loss}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if isinstance(checkpoint["__special_save__"]["loss"], nn.Module):
            self.loss = checkpoint["__special_save__"]["loss"]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.loss(self.net(batch), batch.sum(1, keepdim=True))

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["cfg"].lr)


class Data(LightningDataModule):
    def __init__(self, cfg: Any, encoder: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.width = cfg.net.width

    def train_dataloader(self) -> Any:
        return DataLoader(torch.arange(24.0).reshape(-1, 3)[:, : self.width] / 24, 2)

    val_dataloader = train_dataloader


CONFIG = OmegaConf.create({"lr": 0.01, "net": {"width": "${width}"}, "width": 3})


def fit(folder: Path, *callbacks: Callback, resume: Any = None, every: Any = "1ep", **options: Any) -> Any:
    torch.manual_seed(0)
    saver = SaveCheckpoints(folder, every=every)
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, saver],
        **options,
    )
    module = Forecaster(CONFIG, Path("/x"), nn.MSELoss())
    trainer.fit(module, datamodule=Data(CONFIG, encoder=object()), ckpt_path=resume or saver.last)
    return module, trainer, saver


def test_objects_are_kept_as_text_and_resuming_takes_those_of_the_module(tmp_path, caplog):
    """Bugs: the run is refused at its first step; the module resumes with a text in place of its loss."""
    whole, *_ = fit(tmp_path / "whole", max_epochs=2)
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="stabletrain"):
        _, _, saver = fit(tmp_path / "cut", max_epochs=1)
    told = [each.getMessage() for each in caplog.records if "kept as the text" in each.getMessage()]
    assert len(told) == 1
    assert "hyper_parameters.loss (torch.nn.modules.loss.MSELoss), datamodule_hyper_parameters.encoder" in told[0]
    resumed, trainer, _ = fit(tmp_path / "cut", resume=saver.last, max_epochs=2)
    assert trainer.global_step == 8
    assert torch.equal(whole.net.weight, resumed.net.weight)
    torch.save(load(saver.last), tmp_path / "one.ckpt")
    found = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert found["hyper_parameters"]["loss"] == "MSELoss()"
    again = Forecaster.load_from_checkpoint(tmp_path / "one.ckpt", loss=nn.MSELoss())
    assert again.hparams["cfg"].net.width == 3
    assert torch.equal(again.net.weight, found["state_dict"]["net.weight"])
    assert again.hparams["data"] == "/x"
    assert Data.load_from_checkpoint(tmp_path / "one.ckpt").width == 3


class Kill(Callback):
    """Ends the process's life after this many batches."""

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_start(self, *args: Any) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{}, {"val_check_interval": 2}, {"max_steps": 30}], ids=str)
@pytest.mark.parametrize("every", ["1ep", 2])
def test_early_stopping_advances_over_restarts(every, options, tmp_path):
    """Bug: a checkpoint at the epoch's end is made before its validation, so a run that is killed in every epoch never
    stops (patience 2, and it ran to max_epochs)."""
    options = {"max_epochs": 10, **options}
    _, whole, _ = fit(tmp_path / "whole", EarlyStopping("val", patience=2), **options)
    for _ in range(10):
        stop = EarlyStopping("val", patience=2)
        try:
            _, trainer, _ = fit(tmp_path / "cut", stop, Kill(5), every=every, **options)
        except SystemExit:
            continue
        break
    assert (trainer.global_step, trainer.current_epoch) == (whole.global_step, whole.current_epoch)
    assert (stop.wait_count, stop.stopping_reason.name) == (2, "PATIENCE_EXHAUSTED")
