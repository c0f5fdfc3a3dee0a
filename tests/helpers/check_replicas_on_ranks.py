"""Fits on several ranks, of which one has a bit flipped, for `rank_pool.on_ranks`: what each rank ends with."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import two_ranks
from fits import EventRecorder
from lightning.pytorch import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain import (
    CheckReplicas,
    DDPZeRO1Strategy,
    ResumeExactly,
    Rollback,
    SaveCheckpoints,
    SkipNonFinite,
    TrainingStopped,
)

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
    """How a fit ended on a rank.

    Args:
        weights: and optimizer state, after the last batch.
        events: of replicas and rollbacks, as (kind, step, reason).
        error: the message if the run was stopped.
        counts: checks made, and differences found; empty if there is nothing to compare.
    """

    weights: list[Tensor]
    events: list[tuple[str, int, str]]
    error: str
    counts: list[float]


def fit(folder: Path, kind: Any, *callbacks: Callback, optimizer: Any = ADAMW, **options: Any) -> Ended:
    """Train with `two_ranks.train`; its NaN, on the second rank, is dropped."""
    seen, keep, error = EventRecorder(), Keep(), ""
    stack = [SkipNonFinite(), *callbacks, seen, keep]
    trainer: Any = None
    try:
        _, trainer = two_ranks.train(folder, kind, *stack, make_optimizer=optimizer, **options)
    except TrainingStopped as stopped:
        error = str(stopped)
    kinds = ("replicas_differ", "rollback", "stop")
    events = [(each.kind, each.step, each.reason) for each in seen.events if each.kind in kinds]
    names = ("stability/replica_checks", "stability/replica_differences")
    counts = [float(trainer.callback_metrics[name]) for name in names if trainer and name in trainer.callback_metrics]
    return Ended(keep.weights, events, error, counts)


class Keep(Callback):
    """Keeps the weights and the optimizer's state after each batch: those of the last one remain."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        outer = trainer.optimizers[0]
        state = getattr(outer, "optim", outer).state  # of a ZeroRedundancyOptimizer
        tensors = [each for p in pl_module.parameters() for each in (p, *state.get(p, {}).values())]
        local = [t._local_tensor if isinstance(t, DTensor) else t for t in tensors if isinstance(t, Tensor)]
        self.weights = [each.detach().clone() for each in local]


def check(**options: Any) -> CheckReplicas:
    return CheckReplicas(**{"every": 4, **options})


def faults(folder: Path) -> dict[str, Ended]:
    """On three ranks: no fault, and a flipped bit in a weight and in a moment, which is undone or repaired."""
    flip_moment = Flip(2, 8, name="net.3.bias", state="exp_avg_sq", element=0)
    return {
        "none": fit(folder, "ddp", Rollback(**RING)),
        "weight": fit(folder, "ddp", Rollback(**RING), check(), Flip(1, 7)),
        "moment": fit(folder, "ddp", check(), Rollback(**RING), flip_moment),
        "repair": fit(folder, "ddp", check(on_difference="repair"), Flip(1, 7)),
    }


class OwnState(torch.optim.SGD):
    """Keeps in its state what is its rank's alone."""

    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            self.state[p]["residual"] = p.detach() * int(os.environ["RANK"])
        return super().step(closure)


def more_faults(folder: Path) -> dict[str, Ended]:
    """On two ranks: other ends of a difference, and what is not compared."""
    every, saved = Rollback(**RING), SaveCheckpoints(folder / "saved", every=3, keep_last=None)
    own = {"optimizer": lambda parameters: OwnState(parameters, 0.01, momentum=0.9)}
    zero1 = DDPZeRO1Strategy(process_group_backend="gloo")
    rare = Rollback(**{**RING, "every": 100})
    return {
        "none": fit(folder, "ddp", Rollback(**RING)),
        "healthy": fit(folder, "ddp", Rollback(**RING), check()),
        "rollback": fit(folder, "ddp", every, check(), Flip(0, 7)),
        "last step": fit(folder, "ddp", rare, check(every=100), Flip(1, 11)),
        "stop": fit(folder, "ddp", check(on_difference="stop"), Flip(1, 6, name="net.1.bias")),
        "no rollback": fit(folder, "ddp", check(), Flip(1, 6)),
        "twice": fit(folder, "ddp", Rollback(**RING), check(), Flip(1, 3, 9)),
        "before a save": fit(folder, "ddp", rare, check(every=100), saved, Flip(1, 5, 5)),
        "own state": fit(folder, "ddp", check(), Flip(1, 8, state="momentum_buffer"), **own),
        "zero1": fit(folder, zero1, check(), Flip(1, 5, name="net.3.weight")),
        "fsdp2": fit(folder, "fsdp2", check(), Flip(1, 5)),
    }


def steps_saved(folder: Path) -> list[str]:
    return sorted(each.name for each in (folder / "saved").iterdir() if each.is_dir())


class Kill(Callback):
    """Kills the process before a batch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at and trainer.global_step == self.at - 1:  # a step was dropped before
            os.kill(os.getpid(), signal.SIGKILL)


def killed(folder: Path) -> None:
    """A run that had a difference, has saved a checkpoint after it, and is killed."""
    saving = SaveCheckpoints(folder / "killed", every=4, background=False)
    fit(folder, "ddp", ResumeExactly(), Rollback(**RING), check(), Flip(1, 2), saving, Kill(10))


def resumed(folder: Path) -> dict[str, Ended]:
    """The run that was not killed, and the killed one resumed, without and with another flipped bit."""
    path = str(folder / "killed")

    def plugins() -> list[Callback]:
        return [ResumeExactly(), Rollback(**RING), check(), SaveCheckpoints(folder / "other", every=None)]

    return {
        "none": fit(folder, "ddp", ResumeExactly(), Rollback(**RING)),
        "resumed": fit(folder, "ddp", *plugins(), ckpt_path=path),
        "again": fit(folder, "ddp", *plugins(), Flip(1, 1), ckpt_path=path),
    }


def copies_of_shards(folder: Path) -> dict[str, Ended]:
    """On four ranks: shards with a copy each, under HSDP; the tensors that two ranks of a mesh hold whole."""
    from replicas_on_ranks import Hsdp

    return {
        "none": fit(folder, "fsdp2", Rollback(**RING), make=Hsdp),
        "shard": fit(folder, "fsdp2", Rollback(**RING), check(), Flip(3, 7, element=0), make=Hsdp),
        "moment": fit(folder, "fsdp2", check(on_difference="stop"), Flip(2, 7, state="exp_avg", element=0), make=Hsdp),
    }
