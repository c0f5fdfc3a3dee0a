"""A plain script that goes on by itself: ``python elastic_script.py FOLDER KIND [RANK:STEP ...]``, or under torchrun.

It trains with the default plugins, saves every 4 steps to FOLDER/checkpoints, and writes the whole weights to
FOLDER/final.pt. For each RANK:STEP the rank kills itself before that step, once.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import fits
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import FSDP2Strategy, SaveCheckpoints, default_callbacks

STEPS = 24
"""Of two epochs and a half: 20 samples, 2 to a batch, on one rank or on two."""


class Blocks(LightningModule):
    """Two equal blocks, for FSDP2 to shard; with dropout, so that random numbers count."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(2)])
        self.drop, self.last = nn.Dropout(0.2), nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x,) = batch
        h = self.first(x)
        for block in self.blocks:
            h = h + self.drop(block(h))
        return (self.last(h) - x.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Dies(Callback):
    """Kills its process before a step, unless it has done so before.

    Args:
        rank: that dies.
        step: before which.
        marker: an empty file that tells the next start.
    """

    def __init__(self, rank: int, step: int, marker: Path) -> None:
        self.rank, self.step, self.marker = rank, step, marker

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kind: str, *kills: str, every: int = 4) -> dict[str, Tensor]:
    """Train with strategy ``kind`` (``single``, ``ddp``, ``fsdp2``); the whole weights at the end."""
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    saver = SaveCheckpoints(folder / "checkpoints", every=every, resume="auto")
    places = [tuple(map(int, each.split(":"))) for each in kills]
    dying = [Dies(rank, step, folder / f"died-{rank}-{step}") for rank, step in places]
    options: dict[str, Any] = {"devices": 1}
    if kind != "single":
        options = {"devices": 2, "strategy": "ddp" if kind == "ddp" else FSDP2Strategy()}
    stack = default_callbacks(resume="exactly", checkpoints=saver)
    mine = fits.trainer(*stack, *dying, max_steps=STEPS, max_epochs=-1, default_root_dir=folder, **options)
    module = Blocks()
    data = TensorDataset(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine.fit(module, DataLoader(data, 2, shuffle=True))
    parameters = module.named_parameters()
    weights = {key: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for key, p in parameters}
    if mine.is_global_zero:
        torch.save(weights, folder / "final.pt")
    return weights


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may still run, and would abort the process at the interpreter's end
