"""A small workload, as of a user, that does at a given batch what a test needs."""

import logging
import os
import signal
import time

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain.errors import UserError


class TinyModel(LightningModule):
    def __init__(self, size: int = 4, at: int = -1, does: str = "nothing", pause: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 1)
        self.at, self.does, self.pause = at, does, pause

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self.layer(batch[0]) - 1.0).square().mean()
        time.sleep(self.pause)
        if self.does == "poison":
            loss = loss * float("nan")
        if self.global_step == self.at:
            if self.does == "tell":
                logging.getLogger("stabletrain").warning("tiny step %d", self.global_step)
            if self.does == "raise":
                raise RuntimeError("a bug in the user's module")
            if self.does == "sigkill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.does == "mistake":
                raise UserError("data.path: this file ended early")
            if self.does == "sigint":
                os.kill(os.getpid(), signal.SIGINT)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class TinyData(LightningDataModule):
    def __init__(self, size: int = 4, rows: int = 64, broken: bool = False) -> None:
        super().__init__()
        self.size, self.rows, self.broken = size, rows, broken

    def setup(self, stage: str) -> None:
        if self.broken:
            raise UserError("data.path: /no/such/file is missing; name another")

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        rows = torch.randn(self.rows, self.size, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows), batch_size=8)
