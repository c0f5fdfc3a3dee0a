"""Run by two processes: fits under DDP that drop steps; each rank saves the samples that its events name."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from fits import EventRecorder, run, trainer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from stabletrain import Guard, ResumeExactly, SkipNonFinite

CASES = ["exact", "device", "device, saving"]
"""Modes; with checkpoints, which are saved while the outcome of a dropped step is on its way."""


class Reads(Callback):
    """Records the sample of each batch."""

    def __init__(self) -> None:
        self.samples: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.samples.append(int(batch))


def train(folder: Path, case: str) -> dict[str, Any]:
    """Each rank reads samples of its own, one a batch; the batch of two_ranks.NAN_AT is NaN on rank 1."""
    mode: Any = case.split(",")[0]
    recorder, reads = EventRecorder(), Reads()
    callbacks = [SkipNonFinite(), Guard(mode=mode), ResumeExactly(), recorder, reads]
    if "saving" in case:
        callbacks.append(ModelCheckpoint(folder / case, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    options: dict[str, Any] = {"strategy": two_ranks.strategy("ddp"), "devices": 2, "default_root_dir": folder / case}
    mine = trainer(*callbacks, **options)
    data = DataLoader(torch.arange(2 * two_ranks.BATCHES))
    run(mine, two_ranks.Net(lambda p: torch.optim.AdamW(p, 0.01, fused=mode == "device")), data)
    events = [(event.step, event.kind, event.samples) for event in recorder.events]
    return {"events": events, "bad": reads.samples[two_ranks.NAN_AT]}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in CASES:
        torch.save(train(folder, case), folder / f"{case}-{dist.get_rank()}.pt")
    two_ranks.leave()
