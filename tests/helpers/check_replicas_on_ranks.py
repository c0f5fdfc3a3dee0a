"""Fits on several ranks, of which one has a bit flipped, for `rank_pool.on_ranks`: what each rank has seen and is left with."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import two_ranks
from fits import EventRecorder
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain import CheckReplicas, Rollback, SkipNonFinite, TrainingStopped

ADAMW = partial(torch.optim.AdamW, lr=0.01)
SGD = partial(torch.optim.SGD, lr=0.01)
RING = {"every": 2, "keep": 2, "trust_after": 1}
"""Arguments of `Rollback`: a snapshot every second step."""


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """Flip one bit of one element, in place."""
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor.detach()
    size = local.element_size()
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = local.view(-1).view(integers)
    one = torch.ones(1, dtype=integers) << bit
    bits[element : element + 1] ^= one


class Flip(Callback):
    """Flips a bit on one rank before a batch.

    Args:
        rank: where.
        at: numbers of the batches, counted over the whole fit, those that are made again included.
        name: of the parameter.
        state: key of the optimizer's state; None: the weight itself.
        element: of the flattened tensor.
        bit: from the lowest, 0.
    """

    def __init__(
        self, rank: int, *at: int, name: str = "net.0.weight", state: str = "", element: int = 3, bit: int = 20
    ) -> None:
        self.rank, self.at, self.name, self.state, self.element, self.bit = rank, at, name, state, element, bit
        self.batch = -1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch += 1
        if self.batch in self.at and trainer.global_rank == self.rank:
            tensor = pl_module.get_parameter(self.name)
            flip(trainer.optimizers[0].state[tensor][self.state] if self.state else tensor, self.element, self.bit)


class Ended(NamedTuple):
    """How a fit ended on a rank: weights and optimizer state, events as (kind, step, reason), the error's message, and
    metrics."""

    weights: list[Tensor]
    events: list[tuple[str, int, str]]
    error: str
    metrics: dict[str, float]


def fit(folder: Path, kind: str, *callbacks: Callback, optimizer: Any = ADAMW, **options: Any) -> Ended:
    """Train with `two_ranks.train`; its NaN, on the second rank, is dropped."""
    seen, error = EventRecorder(), ""
    weights: list[Tensor] = []
    metrics: dict[str, float] = {}
    keep = Keep()
    try:
        _, trainer = two_ranks.train(
            folder, kind, SkipNonFinite(), *callbacks, seen, keep, make_optimizer=optimizer, **options
        )
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if "replica_" in key}
    except TrainingStopped as stopped:
        error = str(stopped)
    weights = keep.weights
    events = [(each.kind, each.step, each.reason) for each in seen.events]
    return Ended(weights, events, error, metrics)


class Keep(Callback):
    """Keeps the weights and the optimizer's state after each batch: those of the last one remain."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        outer = trainer.optimizers[0]
        state = [each for p in pl_module.parameters() for each in getattr(outer, "optim", outer).state.get(p, {}).values()]
        tensors = [*pl_module.parameters(), *(each for each in state if isinstance(each, Tensor))]
        self.weights = [(t._local_tensor if isinstance(t, DTensor) else t).detach().clone() for t in tensors]


def rank() -> int:
    return int(os.environ["RANK"])


def differences(folder: Path) -> dict[str, Ended]:
    """A run without a fault and without the plugin, one with it, and runs with a flipped bit."""
    check = partial(CheckReplicas, every=4)

    def run(*callbacks: Callback, **options: Any) -> Ended:
        return fit(folder, "ddp", *callbacks, **options)

    last = int(os.environ["WORLD_SIZE"]) - 1
    return {
        "bare": run(Rollback(**RING)),
        "healthy": run(Rollback(**RING), check()),
        "weight": run(Rollback(**RING), check(), Flip(1, 7)),
        "moment": run(check(), Rollback(**RING), Flip(last, 8, name="net.3.bias", state="exp_avg_sq", element=0)),
        "last step": run(check(every=100), Rollback(**{**RING, "every": 100, "trust_after": 1}), Flip(1, 11)),
        "repair": run(check(on_difference="repair"), Flip(1, 7)),
        "stop": run(check(on_difference="stop"), Flip(last, 6, name="net.1.bias")),
        "no rollback": run(check(), Flip(last, 6)),
        "twice": run(Rollback(**RING), check(), Flip(1, 3, 9)),
    }
