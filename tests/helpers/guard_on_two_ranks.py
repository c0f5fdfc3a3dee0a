"""Run by two processes: fits under DDP and FSDP2 with a fault on one rank only; each rank saves its results."""

import math
import os
import sys
from pathlib import Path
from typing import Any

import fits
import torch
import torch.distributed as dist
import two_ranks
from fits import Recorder
from torch import Tensor

from stabletrain import ClipNorm, Guard, SkipNonFinite, SkipOutliers

CASES = [("ddp", "exact", 1), ("ddp", "exact", 2), ("ddp", "device", 1), ("fsdp2", "exact", 1), ("fsdp2", "device", 1)]

GARBAGE_AT = 40


def train(folder: Path, kind: str | None, mode: Any, accumulate: int) -> dict[str, Any]:
    """On two ranks with a kind of strategy, or on one for None."""
    recorder = Recorder()
    callbacks = [recorder, ClipNorm(max_norm=1.0), SkipNonFinite(), Guard(mode=mode)]
    options: dict[str, Any] = {
        "make_optimizer": lambda p: torch.optim.AdamW(p, 0.01, fused=mode == "device"),
        "accumulate_grad_batches": accumulate,
    }
    weights, mine = two_ranks.train(folder, kind, *callbacks, **options)
    outcomes = [(o.loss, o.grad_norm, o.skipped, o.clipped) for o in recorder.state]
    return {"weights": list(weights.values()), "outcomes": outcomes, "global_step": mine.global_step}


class NanGradient(two_ranks.Net):
    """In every fourth batch the gradient of one row is NaN, at a finite loss; of two ranks only the second sees it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 4 == 3 and self.global_rank == self.trainer.world_size - 1:
            loss = loss + _NanGradient.apply(self.net[0].weight)  # type: ignore[no-untyped-call]
        return loss


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.new_full(ctx.shape, math.nan)


def train_fp16(folder: Path, kind: str | None) -> dict[str, Any]:
    """With a loss scaler; on two ranks with a kind of strategy, or on one for None."""
    recorder = Recorder()
    options: dict[str, Any] = {
        "make_optimizer": lambda p: torch.optim.AdamW(p, 0.01),
        "make": NanGradient,
        "max_epochs": 3,
        "plugins": [fits.scaler(init_scale=1024.0, growth_interval=10**6)],
    }
    weights, _ = two_ranks.train(folder, kind, recorder, SkipNonFinite(), **options)
    outcomes = [(o.loss_scale, o.skipped, o.overflow, o.overflows_in_a_row) for o in recorder.state]
    return {"weights": list(weights.values()), "outcomes": outcomes}


class Garbage(two_ranks.Net):
    """One row of two batches is a thousand times too large; of two ranks only the second sees it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        number = self.current_epoch * two_ranks.BATCHES + batch_idx
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(number))
        if number in (GARBAGE_AT, GARBAGE_AT + 1):
            x[1] *= 1000.0
        x = x[self.global_rank :: self.trainer.world_size]
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean()


def train_outliers(folder: Path, kind: str | None, mode: Any) -> dict[str, Any]:
    """Two outliers in a row, without a clipper; on two ranks with a kind of strategy, or on one for None."""
    recorder = Recorder()
    callbacks = [recorder, SkipOutliers(window=32, min_samples=16), Guard(mode=mode)]
    options: dict[str, Any] = {
        "make_optimizer": lambda p: torch.optim.AdamW(p, 0.01, fused=mode == "device"),
        "make": Garbage,
        "max_epochs": 4,
    }
    weights, _ = two_ranks.train(folder, kind, *callbacks, **options)
    outcomes = [(o.grad_norm, o.applied_norm, o.skipped) for o in recorder.state]
    return {"weights": list(weights.values()), "outcomes": outcomes}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for mode in ("exact", "device"):
        torch.save(train_outliers(folder, "ddp", mode), folder / f"outliers-{mode}-{os.environ['RANK']}.pt")
    torch.save(train_fp16(folder, "ddp"), folder / f"fp16-{os.environ['RANK']}.pt")
    for case in CASES:
        result = train(folder, *case)
        torch.save(result, folder / f"{'-'.join(map(str, case))}-{dist.get_rank()}.pt")
    two_ranks.leave()
