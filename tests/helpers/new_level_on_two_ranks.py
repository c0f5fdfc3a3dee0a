"""Run by two processes: the loss of the second rank alone has a new level, or outliers; each rank saves what it did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import new_level
import torch
import torch.distributed as dist
import two_ranks
from fits import everything
from new_level import AT, decisions, rules, train
from torch import Tensor

OUTLIERS = (60, 62, 63, 64, 70, 90)
CASES = [(what, mode) for what in ("level", "outliers") for mode in ("exact", "device")]


class Model(new_level.Model):
    """Rank r of n sees every n-th row of a batch; the factor is on the odd rows, so that of two ranks one sees it."""

    def training_step(self, batch: int, batch_idx: int) -> Tensor:
        number = int(batch)
        self.seen.append(number)
        x, noise = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(number))
        factors = torch.ones(64, 1)
        factors[1::2] = self.factor(number)
        mine = slice(self.global_rank, None, self.trainer.world_size)
        x, noise, factors = x[mine], noise[mine], factors[mine]
        losses = (self.net(x) - x.sum(1, keepdim=True) - noise[:, :2]).square() + 1.0
        return (losses * factors).mean()


def run(folder: Path, what: str, mode: Any, ranks: int) -> dict[str, Any]:
    """Train on so many ranks."""
    model = Model((lambda n: 7.0 if n >= AT else 1.0) if what == "level" else lambda n: 7.0 if n in OUTLIERS else 1.0)
    options: dict[str, Any] = {"strategy": two_ranks.strategy("ddp"), "devices": 2} if ranks == 2 else {}
    stack, rollback = rules(mode)
    trainer, record = train(folder, model, *stack, use_distributed_sampler=False, **options)
    return {
        "decisions": decisions(record),
        "skipped": [outcome.step for outcome in record.outcomes if outcome.skipped],
        "seen": model.seen,
        "excluded": len(rollback.excluded),
        "given_back": [len(level.given_back) for level in rollback._levels],
        "end": everything(trainer),
        "state": repr([each.state_dict() for each in stack]),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for case in CASES:
        torch.save(run(folder / "-".join(case), *case, ranks=2), folder / f"{'-'.join(case)}-{dist.get_rank()}.pt")
    two_ranks.leave()
