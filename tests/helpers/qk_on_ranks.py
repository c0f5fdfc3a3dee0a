"""Attention whose query and key weights are scaled on several ranks, for `rank_pool.on_ranks`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from two_ranks import NAN_AT, Net, train

from stabletrain import ClipQK, SkipNonFinite


class Attention(nn.Module):
    """Three heads of two rows each: with two ranks the middle one is in both shards."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.out = nn.Linear(6, 1)
        with torch.no_grad():
            for each in (self.q, self.k):
                each.weight.mul_(torch.tensor([6.0, 3.0, 0.1]).repeat_interleave(2)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each(x)[None].unflatten(-1, (3, 2)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Attending(Net):
    """Each row of a rank's batch attends to itself and to the row after it on that rank only: rows are a sequence."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        self.net = Attention()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(batch_idx))
        x[1] *= 3  # of two ranks the second one has the larger logits
        if batch_idx == NAN_AT:
            x[1, 0, 0] = torch.nan
        parts = [x[self.global_rank]] if self.trainer.world_size == 2 else list(x)
        return torch.stack([self.net(part).square().mean() for part in parts]).mean()


def clipped(folder: Path, kind: str | None, lr: float) -> list[dict[str, Tensor]]:
    """The whole weights after a training with `ClipQK`, and after one without it."""
    make = partial(AdamW, lr=lr, weight_decay=0.0)
    plugins: list[list[Any]] = [[ClipQK(tau=2.0, query=r"net\.q", key=r"net\.k", heads=3)], []]
    return [train(folder, kind, SkipNonFinite(), *each, make_optimizer=make, make=Attending)[0] for each in plugins]
