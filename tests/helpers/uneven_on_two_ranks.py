"""Two ranks whose loaders have different lengths."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import two_ranks
from fits import trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from stabletrain import SkipNonFinite
from stabletrain.errors import UserError


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter(torch.zeros(9, 1))


class Net(two_ranks.Net):
    """Counts its training steps; ``reloaded``: batches of this rank from the second epoch on."""

    def __init__(self, *lengths: Any, norm: bool = False, validate: Any = None) -> None:
        super().__init__(lambda parameters: torch.optim.SGD(parameters, lr=0.01))
        self.lengths, self.validate, self.steps = lengths, validate, 0
        if norm:
            self.net.append(nn.BatchNorm1d(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, 0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(torch.ones(4, 6))

    def train_dataloader(self) -> Any:
        length = self.lengths[min(self.current_epoch, len(self.lengths) - 1)]
        return DataLoader(Endless() if length is None else torch.zeros(length, 1), batch_size=1)

    def val_dataloader(self) -> Any:
        return [] if self.validate is None else DataLoader(torch.zeros(self.validate, 1))


def run(folder: Path, kind: str, module: Net, **options: Any) -> tuple[int, str]:
    """How many steps this rank has made, and the error that has ended the fit."""
    mine = trainer(
        SkipNonFinite(),
        default_root_dir=folder,
        use_distributed_sampler=False,
        strategy=two_ranks.strategy(kind),
        devices=2,
        **{"max_steps": -1, "max_epochs": 1, **options},
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mine.fit(module)
    except UserError as error:
        return module.steps, str(error)
    return module.steps, ""


def cases(folder: Path) -> dict[str, tuple[int, str]]:
    """Every case, by its name."""
    rank = int(os.environ["RANK"])
    uneven = 6 + rank
    return {
        "one epoch": run(folder, "ddp", Net(uneven)),
        "max_steps over several epochs": run(folder, "ddp", Net(uneven), max_steps=20, max_epochs=-1),
        "max_steps within the first": run(folder, "ddp", Net(uneven), max_steps=3, max_epochs=-1),
        "max_steps, but validation at other batches": run(
            folder, "ddp", Net(uneven, validate=2), max_steps=5, max_epochs=-1, val_check_interval=0.5
        ),
        "limited": run(folder, "ddp", Net(uneven), limit_train_batches=6),
        "without a length": run(folder, "ddp", Net(None), max_steps=3),
        "reloaded": run(folder, "ddp", Net(6, uneven), max_epochs=3, reload_dataloaders_every_n_epochs=1),
        "fsdp2": run(folder, "fsdp2", Net(uneven)),
        "validation": run(folder, "ddp", Net(2, validate=3 + rank)),
        "validation with buffers": run(folder, "ddp", Net(2, validate=3 + rank, norm=True)),
        "validation with shards": run(folder, "fsdp2", Net(2, validate=3 + rank)),
    }
