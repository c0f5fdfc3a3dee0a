"""Run by two ranks: what they agree on when only one of them has a loss, and how parameters are placed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import two_ranks
from lightning.pytorch import Callback, LightningModule, Trainer
from replicas_on_ranks import FrozenRest, Plain

from stabletrain import SkipNonFinite
from stabletrain.runtime.guard.measurement import add_up
from stabletrain.runtime.ranks import Ranks

CASES = {
    "ddp": ("ddp", two_ranks.Net),
    "fsdp2": ("fsdp2", two_ranks.Net),
    "frozen rest": ("fsdp2", FrozenRest),
    "tp": ("tp", Plain),
}


class Placements(Callback):
    """Records the placements at the end of the fit; after it the strategy has no model."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ranks = Ranks(trainer)
        self.found = {name: ranks.placement(p) for name, p in pl_module.named_parameters()}


def train(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each case the placements, and what the ranks have agreed on."""
    return {name: _train(folder, *case) for name, case in CASES.items()}


def _train(folder: Path, kind: str, module: Any) -> dict[str, Any]:
    placements = Placements()
    callbacks = [SkipNonFinite(), placements]
    _, mine = two_ranks.train(folder, kind, *callbacks, make_optimizer=lambda p: torch.optim.SGD(p, 0.01), make=module)
    ranks = Ranks(mine)
    rank = dist.get_rank()
    gradient = [torch.tensor([3.0, 4.0])]  # this rank's copy, equal to the other's
    one_has_none = add_up(ranks, [torch.tensor(3.0), torch.tensor(5.0)] if rank == 0 else [], None, gradient)
    loss = torch.tensor(float("nan") if rank else 1.0)
    nan_on_one = add_up(ranks, [loss], None, gradient if rank else [], False, rank == 1, True)
    without = add_up(ranks, [], None, [], rank == 0)
    weighted = add_up(ranks, [torch.tensor(6.0)] * (1 + rank), [3.0] * (1 + rank), gradient)
    nan_in_one = add_up(ranks, [loss], None, [torch.tensor([float("nan") if rank == 0 else 1.0])])
    assert one_has_none.loss is not None
    assert nan_on_one.loss is not None
    assert weighted.loss is not None
    return {
        "placements": placements.found,
        "one_has_none": one_has_none.loss.item(),
        "none_has_one": without.loss is None,
        "nan_on_one": repr(nan_on_one.loss.item()),
        "weighted": (weighted.loss.item(), float(weighted.weight)),
        "norms": [repr(each.grad_norm.item()) for each in (one_has_none, without, nan_in_one)],
        "mean_square": nan_on_one.grad_norm.item() ** 2,
        "flags": [[float(flag) for flag in each.flags] for each in (one_has_none, nan_on_one, without)],
        "any": [ranks.any(rank == 1), ranks.any(False)],
    }
