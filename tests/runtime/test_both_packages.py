"""Whole runs under ``pytorch_lightning`` equal those under ``lightning.pytorch``, bit for bit."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import assert_same, everything, run
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import stabletrain as st
from stabletrain.testing.toy import quiet
from stabletrain.testing.trainer import PACKAGES, lightning_package, quiet_trainer, trained_with

ROLLBACK: dict[str, Any] = {"every": 8, "trust_after": 4, "rewarm": 4, "window": 16, "delay": 2, "min_samples": 8}
ROLLBACK |= {"patience": 4, "regime_after": 4, "cool_down": 8, "check_every": 4}


class Samples(Dataset[tuple[Tensor, int]]):
    """120 samples."""

    def __init__(self) -> None:
        self.x = torch.randn(120, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], index


BAD = {7, 31}
"""Samples whose loss is NaN in the third epoch."""


def make_module(crash_at: int | None) -> Any:
    """A module of the package in use, with dropout and averages of the epoch; it records its samples."""

    class Module(lightning_package().LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))
            self.samples: list[list[int]] = []

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if len(self.samples) == crash_at:
                raise KeyError("the kill")
            self.samples.append(batch[1].tolist())
            loss: Tensor = (self.net(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
            if self.current_epoch == 2 and BAD.intersection(self.samples[-1]):
                return loss * torch.nan
            self.log("train_loss", loss, on_step=True, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.net(batch[0]).square().mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)]

    return Module()


def train(folder: Path, *callbacks: Any, crash_at: int | None = None, resume: Any = None) -> Any:
    """Eight epochs of ten batches, two of which share a step from the third epoch on; returns what the run has done."""
    theirs = importlib.import_module(f"{lightning_package().__name__}.callbacks")
    others = [theirs.GradientAccumulationScheduler({0: 1, 3: 2}), theirs.EarlyStopping("val_loss", patience=5)]
    mine = quiet_trainer(*callbacks, *others, default_root_dir=folder, max_epochs=8, log_every_n_steps=1)
    module = make_module(crash_at)
    torch.manual_seed(0)
    train_loader = DataLoader(Samples(), 12, shuffle=True)
    with quiet():
        if crash_at is None:
            run(mine, module, train_loader, DataLoader(Samples(), 30), ckpt_path=resume)
        else:
            with pytest.raises(KeyError, match="the kill"):
                run(mine, module, train_loader, DataLoader(Samples(), 30), ckpt_path=resume)
    early = others[1].state_dict()
    return {
        **everything(mine),
        "samples": module.samples,
        "metrics": {key: float(value) for key, value in mine.callback_metrics.items()},
        "epoch": mine.current_epoch,
        "early": {key: float(early[key]) for key in ("wait_count", "stopped_epoch", "best_score")},
        "callbacks": [type(each).__name__ for each in mine.checkpoint_callbacks],
    }


def test_a_rollback_restores_the_loops_of_both_packages(tmp_path: Path) -> None:
    """Bugs: loop counters, accumulation or early stopping found under one name only: batches and steps are lost."""
    done = {}
    for package in PACKAGES:
        with trained_with(package):
            rollback = st.Rollback(**ROLLBACK)
            stack = [st.SkipNonFinite(max_in_a_row=1), rollback, st.ClipZScore(warmup_steps=4), st.ResumeExactly()]
            done[package] = train(tmp_path / package, *stack)
            replay = st.Rollback(**ROLLBACK, replay=tmp_path / package / "interventions.jsonl")
            stack = [st.SkipNonFinite(max_in_a_row=1), replay, st.ClipZScore(warmup_steps=4), st.ResumeExactly()]
            again = train(tmp_path / f"{package} again", *stack)
            assert_same(*({key: each[key] for key in each if "module" in key} for each in (done[package], again)))
    assert len((tmp_path / PACKAGES[0] / "interventions.jsonl").read_text().splitlines()) >= 2
    assert_same(*done.values())


def test_a_killed_run_resumes_equally_in_both_packages(tmp_path: Path) -> None:
    """Bugs: a checkpoint callback that Lightning does not see; a resumed loop, or its data, of one package wrong."""
    done = {}
    for package in PACKAGES:
        with trained_with(package):
            folder = tmp_path / package

            def stack(checkpoints: Path) -> list[Any]:
                save = st.SaveCheckpoints(checkpoints, every=7, keep_last=None, background=False)
                return [save, st.SkipNonFinite(), st.ResumeExactly(), st.Rollback(**ROLLBACK)]

            whole = train(folder, *stack(folder / "whole"))
            before = train(folder, *stack(folder / "killed"), crash_at=27)
            rest = train(folder, *stack(folder / "killed"), resume=folder / "killed")
            resumed_at = len(whole["samples"]) - len(rest["samples"])
            assert 20 < resumed_at < 27
            assert whole["samples"] == [*before["samples"][:resumed_at], *rest.pop("samples")]
            assert_same({key: value for key, value in whole.items() if key != "samples"}, rest)
            assert whole["callbacks"] == ["SaveCheckpoints"]
            done[package] = whole
    assert_same(*done.values())
