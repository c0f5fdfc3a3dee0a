"""Run by two processes: fits under DDP and FSDP2 with a NaN on one rank only; each rank saves its results."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from fits import Recorder

from stabletrain import ClipNorm, Guard, SkipNonFinite

CASES = [("ddp", "exact", 1), ("ddp", "exact", 2), ("ddp", "device", 1), ("fsdp2", "exact", 1), ("fsdp2", "device", 1)]


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


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in CASES:
        result = train(folder, *case)
        torch.save(result, folder / f"{'-'.join(map(str, case))}-{dist.get_rank()}.pt")
    two_ranks.leave()
