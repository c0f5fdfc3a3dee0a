"""Run by torchrun for test_faults_distributed.py: fits with faults on rank 1 only; each rank saves its results."""

import sys
from pathlib import Path
from typing import Any

import torch
import two_ranks
from fits import Recorder
from going_back import Case

from stabletrain import SkipNonFinite
from stabletrain.chaos import BadBatch, BadGradient, Fault, ScaledLoss, SlowRank

FAULTS = {
    "nan_grad": lambda: BadGradient(at_step=2, rank=1),
    "nan_loss": lambda: ScaledLoss(at_step=2, rank=1),
    "bad_batch": lambda: BadBatch(at_step=2, rank=1),
    "slow_rank": lambda: SlowRank(at_step=2, seconds=0.1, steps=1, rank=1),
}


def train(folder: Path, *faults: Fault) -> dict[str, Any]:
    """This rank's number, its weights at the end, and the steps that it skipped."""
    recorder = Recorder()
    options = {"strategy": two_ranks.strategy("ddp"), "devices": 2, "max_epochs": 1, "default_root_dir": folder}
    module, trainer, _ = Case(trainer=options).fit(SkipNonFinite(), recorder, *faults)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    return {"rank": trainer.global_rank, "weights": weights, "skipped": [o.step for o in recorder.state if o.skipped]}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, make in {"none": None, **FAULTS}.items():
        result = train(folder / name, *([make()] if make else []))
        torch.save(result, folder / f"{name}-{result['rank']}.pt")
    two_ranks.leave()
