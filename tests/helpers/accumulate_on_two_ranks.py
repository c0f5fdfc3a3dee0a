"""Run by two processes: accumulation windows whose micro-batches differ between the ranks, against one big batch."""

import os
import sys
from pathlib import Path
from typing import Any

import fits
import torch
import two_ranks
from fits import Recorder, everything, fit
from lightning.pytorch.strategies import DDPStrategy
from out_of_memory import Hungry
from tokens import Tokens, batches, moved
from torch.utils.data import DataLoader

from stabletrain import AccumulateAuto, AccumulateTokens, Guard

TOKENS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "counts": ((3, 30), (7, 17)),
    "0 on one rank": ((3, 0), (7, 17)),
    "0 at first": ((0, 30), (0, 17)),
    "only one rank": ((0, 0), (7, 17)),
    "nothing at first": ((0, 0, 3, 30), (0, 0, 7, 17)),
}
"""The counts of the micro-batches of each rank, in windows of two."""

MEMORY: dict[str, tuple[tuple[int, int], str, int]] = {
    "none fails": ((99, 99), "forward", 2),
    "one rank, forward": ((99, 2), "forward", 2),
    "one rank, backward": ((1, 99), "backward", 3),
    "both": ((2, 1), "backward", 1),
}
"""The limits of each rank, where it fails, micro-batches in a window."""


def counted(case: str) -> list[Any]:
    """All micro-batches of a case, first those of rank 0."""
    first, second = TOKENS[case]
    return batches(*first, *second)


def train(rank: int, case: str, **options: Any) -> dict[str, Any]:
    items, half = counted(case), len(TOKENS[case][0])
    mine = DataLoader(items[rank * half : (rank + 1) * half], batch_size=None)  # type: ignore[arg-type]
    module, recorder = Tokens(fused=True), Recorder()
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = fit(
        module,
        mine,
        AccumulateTokens("labels"),
        recorder,
        Guard(**options),
        accumulate_grad_batches=2,
        strategy=strategy,
        devices=2,
        use_distributed_sampler=False,
    )
    losses = [each.loss for each in recorder.state]
    return {"moved": moved(module), "losses": losses, "end": everything(trainer)}


def run_out(rank: int, limits: tuple[int, int], where: str, accumulate: int) -> dict[str, Any]:
    """Each rank sees every other row; the ranks run out of memory with more than their limits of rows."""
    items = [(x[rank::2], fault) for x, fault in rows()]
    module, recorder = Hungry(limits[rank], where, since=1), Recorder()
    trainer = fit(
        module,
        items,
        AccumulateAuto(),
        recorder,
        accumulate_grad_batches=accumulate,
        strategy=DDPStrategy(process_group_backend="gloo"),
        devices=2,
        use_distributed_sampler=False,
    )
    end = everything(trainer)
    del end["module.seen"]
    return {"end": end, "losses": [each.loss for each in recorder.state], "failures": module.failures}


def rows() -> list[Any]:
    return fits.batches(*[fits.HEALTHY] * 6)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    ends: dict[Any, Any] = {
        (case, mode): train(rank, case, mode=mode) for case in TOKENS for mode in ("exact", "device")
    }
    for case in MEMORY:
        ends[case] = run_out(rank, *MEMORY[case])
    torch.save(ends, folder / f"{rank}.pt")
    two_ranks.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
