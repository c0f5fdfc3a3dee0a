"""SIGTERM to some ranks at some batches; all must stop at the same one, and go on exactly. For `rank_pool`."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import elastic_script
import fits
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import FSDP2Strategy, ResumeExactly, SaveCheckpoints, check_sigterm_every

PER_EPOCH, STEPS = 10, 25


class Case(NamedTuple):
    """When which ranks get a SIGTERM.

    Args:
        every: batches between two questions.
        batches: by rank, the number of the batch, from 0, at whose start it gets the signal.
        window: batches that are accumulated.
        in_validation: the signal comes in the first batch of the validation after that batch.
    """

    every: int
    batches: dict[int, int]
    window: int = 1
    in_validation: bool = False

    @property
    def expected(self) -> int:
        """The number of batches after which all ranks stop."""
        begun = min(self.batches.values()) + 1
        if self.in_validation:
            return begun
        return next(
            n for n in range(begun, 1000)
            if (n // self.every > (begun - 1) // self.every or n % PER_EPOCH == 0)
            and (n % PER_EPOCH % self.window == 0)
        )  # fmt: skip


class Signals(Callback):
    def __init__(self, case: Case) -> None:
        self.case, self.seen = case, -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if not self.case.in_validation:
            self._send(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.case.in_validation and batch_idx == 0:
            self._send(trainer)

    def _send(self, trainer: Trainer) -> None:
        if self.case.batches.get(trainer.global_rank) == self.seen:
            os.kill(os.getpid(), signal.SIGTERM)


class Module(elastic_script.Blocks):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)


def train(folder: Path, kind: str, case: Case, interrupted: bool) -> tuple[int, int, dict[str, Tensor]]:
    """The exit code (0: the fit has ended), batches trained on, and the whole weights."""
    seed_everything(3, verbose=False)
    saver = SaveCheckpoints(folder, every=None, resume="auto")
    signals = [Signals(case)] if interrupted else []
    strategy = "ddp" if kind == "ddp" else FSDP2Strategy()
    limits = {"max_steps": STEPS // case.window, "max_epochs": -1, "accumulate_grad_batches": case.window}
    mine = fits.trainer(ResumeExactly(), saver, *signals, strategy=strategy, devices=2, **limits)
    check_sigterm_every(mine, case.every)
    module, code = Module(), 0
    data = TensorDataset(torch.randn(4 * PER_EPOCH, 6, generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mine.fit(module, DataLoader(data, 2, shuffle=True), DataLoader(data, 5))
        except SystemExit as end:
            code = int(end.code or 0)
    parameters = module.named_parameters()
    weights = {key: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for key, p in parameters}
    return code, mine.fit_loop.epoch_loop.total_batch_idx + 1, weights


def main(folder: Path, kind: str, cases: list[Case]) -> list[dict[str, Any]]:
    """Of each case: an uninterrupted run, one that gets the signals, and what goes on after it."""
    found, whole = [], {}
    for i, case in enumerate(cases):
        if case.window not in whole:
            whole[case.window] = train(folder / f"whole-{case.window}", kind, case, False)[2]
        code, batches, _ = train(folder / str(i), kind, case, True)
        saved = sorted(each.name for each in (folder / str(i)).iterdir())
        end, _, weights = train(folder / str(i), kind, case, False)
        found.append(
            {"code": code, "batches": batches, "saved": saved, "end": end, "weights": weights,
             "whole": whole[case.window]}
        )  # fmt: skip
        torch.distributed.barrier()
        shutil.rmtree(folder / str(i), ignore_errors=True)
    return found
