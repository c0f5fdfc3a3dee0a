"""A small workload, as of a user, that does at a given batch what a test needs."""

import json
import logging
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain.errors import UserError


class TinyModel(LightningModule):
    def __init__(self, size: int = 4, at: int = -1, does: str = "nothing", pause: float = 0.0, rank: int = -1) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 1)
        self.at, self.does, self.pause, self.rank = at, does, pause, rank

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self.layer(batch[0]) - 1.0).square().mean()
        time.sleep(self.pause)
        if self.does == "poison":
            loss = loss * float("nan")
        if self.global_step == self.at and self.rank in (-1, self.global_rank):
            if self.does == "tell":
                logging.getLogger("stabletrain").warning("tiny step %d", self.global_step)
            if self.does == "raise":
                raise RuntimeError("a bug in the user's module")
            if self.does == "kill_torchrun":
                os.kill(os.getppid(), signal.SIGKILL)
            if self.does == "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.does == "mistake":
                raise UserError("data.path: this file ended early")
            if self.does in ("sigint", "sigterm"):
                os.kill(os.getpid(), signal.Signals[self.does.upper()])
            if self.does == "exit":
                sys.exit(0)
            if self.does == "os_exit":
                os._exit(7)
            if self.does == "hang":
                time.sleep(1000)
            if self.does == "barrier":
                self.trainer.strategy.barrier()
            if self.does == "remove_folder":
                shutil.rmtree(self.trainer.default_root_dir)
        return loss

    def on_fit_start(self) -> None:
        if self.does == "settings":
            torch.set_float32_matmul_precision("medium")

    def on_train_end(self) -> None:
        if self.does == "settings":
            found = {
                "threads": torch.get_num_threads(),
                "float32_matmul_precision": torch.get_float32_matmul_precision(),
                "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
                "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
                "variables": {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "PYTHONHASHSEED")},
            }
            (Path(self.trainer.default_root_dir) / "settings.json").write_text(json.dumps(found))
            self.file = (Path(self.trainer.default_root_dir) / "unclosed.txt").open("w")
            self.file.write("what the user has written")

    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> int | None:
        leaves = self.does == "leave" and self.global_step == self.at and self.rank in (-1, self.global_rank)
        return -1 if leaves else None

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.does == "raise_in_validation" and self.rank in (-1, self.global_rank):
            raise RuntimeError("a bug in validation")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TinyData(LightningDataModule):
    def __init__(self, size: int = 4, rows: int = 64, broken: bool = False, broken_row: int = -1) -> None:
        super().__init__()
        self.size, self.rows, self.broken, self.broken_row = size, rows, broken, broken_row

    def setup(self, stage: str) -> None:
        if self.broken:
            raise UserError("data.path: /no/such/file is missing; name another")

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        rows = torch.randn(self.rows, self.size, generator=torch.Generator().manual_seed(0))
        if self.broken_row >= 0:
            return DataLoader(BrokenRow(rows, self.broken_row), batch_size=8, num_workers=1)
        return DataLoader(TensorDataset(rows), batch_size=8)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(TensorDataset(torch.zeros(8, self.size)), batch_size=8)


class BrokenRow(TensorDataset):
    """Raises an exception at one row, in the data loader's process."""

    def __init__(self, rows: Tensor, broken_row: int) -> None:
        super().__init__(rows)
        self.broken_row = broken_row

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if index == self.broken_row:
            raise RuntimeError("a broken row")
        return super().__getitem__(index)
