"""A small module, as of a user, that does at a given step what a trial asks for."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sqlite3
import sys
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain.errors import UserError


class FaultyModel(LightningModule):
    """Args: at: the step; does: the name of a function below, and an argument after a colon; rank: where; pause: s."""

    def __init__(self, at: int = -1, does: str = "nothing", rank: int | None = None, pause: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.at, self.does, self.rank, self.pause = at, does, rank, pause
        self.done = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        if self.global_step == self.at and not self.done and self.rank in (None, self.global_rank):
            self.done = True
            name, _, argument = self.does.partition(":")
            FAULTS[name](Path(self.trainer.default_root_dir), argument)
        loss: Tensor = (self.layer(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Rows(LightningDataModule):
    """Args: rows: number of random rows."""

    def __init__(self, rows: int = 4096) -> None:
        super().__init__()
        self.rows = rows

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        rows = torch.randn(self.rows, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows), batch_size=8, shuffle=True)


def nothing(folder: Path, argument: str) -> None:
    pass


def raises(folder: Path, argument: str) -> None:
    raise RuntimeError("a bug in the user's module")


def mistake(folder: Path, argument: str) -> None:
    raise UserError("data.path: this file ended early; use a complete one")


def exits(folder: Path, argument: str) -> None:
    sys.exit(int(argument))


def leaves(folder: Path, argument: str) -> None:
    os._exit(int(argument))


def send(folder: Path, argument: str) -> None:
    os.kill(os.getpid(), getattr(signal, argument))


def _of(folder: Path, name: str) -> Path:
    """A path below the run's folder, or ``store`` for the database in the current folder."""
    return Path("mlflow.db").absolute() if name == "store" else folder / name if name != "run" else folder


def remove(folder: Path, argument: str) -> None:
    path = _of(folder, argument)
    if not path.is_dir():
        path.unlink(missing_ok=True)
    while path.is_dir():  # at this moment a checkpoint may be written into it
        shutil.rmtree(path, ignore_errors=True)


def truncate(folder: Path, argument: str) -> None:
    os.truncate(_of(folder, argument), 0)


def garbage(folder: Path, argument: str) -> None:
    _of(folder, argument).write_bytes(b"\x00\xff not what it was \xfe" * 4096)


def become_folder(folder: Path, argument: str) -> None:
    remove(folder, argument)
    _of(folder, argument).mkdir(parents=True)


def become_file(folder: Path, argument: str) -> None:
    remove(folder, argument)
    _of(folder, argument).write_text("a file in the place of a folder")


def become_pipe(folder: Path, argument: str) -> None:
    remove(folder, argument)
    os.mkfifo(_of(folder, argument))


def cut(folder: Path, argument: str) -> None:
    """Leave the beginning of a line at the end of a file of JSON lines, as a killed process does."""
    with _of(folder, argument).open("a") as file:
        file.write('{"step": 1, "plu')


def lock(folder: Path, argument: str) -> None:
    """Lock the store in another connection for a time in seconds."""
    held = threading.Event()

    def hold() -> None:
        database = sqlite3.connect("mlflow.db", isolation_level=None, timeout=30)
        database.execute("BEGIN EXCLUSIVE")
        held.set()
        time.sleep(float(argument))
        database.execute("ROLLBACK")

    threading.Thread(target=hold, daemon=True).start()
    held.wait(30)


def drop_tables(folder: Path, argument: str) -> None:
    with sqlite3.connect("mlflow.db", timeout=30) as database:
        for table in argument.split("+"):
            database.execute(f"DROP TABLE {table}")


def fill(folder: Path, argument: str) -> None:
    """Fill the file system that contains the run's folder, or the store's folder."""
    with (_of(folder, argument) / "ballast").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 65536)
        except OSError:
            try:
                while True:
                    file.write(b"\0")
            except OSError:
                return


def small_files(folder: Path, argument: str) -> None:
    """From now on no file of this process can grow beyond a number of bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(argument), resource.RLIM_INFINITY))


def few_files(folder: Path, argument: str) -> None:
    """From now on this process can open at most so many files at a time in addition to those that are open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + int(argument), limit))


FAULTS = {
    each.__name__: each
    for each in (
        nothing, raises, mistake, exits, leaves, send, remove, truncate, garbage, become_folder, become_file,
        become_pipe, cut, lock, drop_tables, fill, small_files, few_files,
    )
}  # fmt: skip
