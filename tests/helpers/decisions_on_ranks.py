"""Fits on several ranks with a fault on one of them: what was decided at each step, and how each rank ended."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import two_ranks
from fits import EventRecorder, Recorder
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from replicas_on_ranks import Hsdp
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from stabletrain import ClipNorm, ClipUnitwise, Rollback, SkipNonFinite, default_callbacks
from stabletrain.runtime.stop import TrainingStopped

STRATEGIES = {"ddp": "ddp", "fsdp2": "fsdp2", "zero1": "ddp", "hsdp": "fsdp2"}
"""Name -> kind for `two_ranks.strategy`; ``zero1`` is an optimizer, ``hsdp`` needs four ranks."""

FAULTS = ("none", "loss", "gradient", "inf gradient", "micro-batch", "weights")
FAULT_AT = 6
BAD_RANK = 1


class Fault(Callback):
    """A fault on one rank only.

    Args:
        kind: one of `FAULTS`.
        times: in how many batches.
    """

    def __init__(self, kind: str, times: int = 1) -> None:
        self.kind, self.times, self.left = kind, times, times

    def _is_due(self, batch_idx: int) -> bool:
        return int(os.environ["RANK"]) == BAD_RANK and self.left > 0 and batch_idx >= FAULT_AT

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.spoil_loss = False
        self.batch_idx = batch_idx
        if self._is_due(batch_idx):
            if self.kind in ("loss", "micro-batch"):
                self.left -= 1
                pl_module.spoil_loss = True
            elif self.kind == "weights":
                self.left -= 1
                weight = pl_module.net[0].weight
                (weight.to_local() if isinstance(weight, DTensor) else weight).data[:] = math.nan

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The gradients are reduced: only this rank's copy, or its shard, is bad."""
        if self.kind.endswith("gradient") and self._is_due(self.batch_idx):
            self.left -= 1
            gradient = pl_module.net[0].weight.grad
            values = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            values.view(-1)[-1] = math.inf if self.kind == "inf gradient" else math.nan


def _spoiling(kind: type[two_ranks.Net]) -> type[two_ranks.Net]:
    class Spoiled(kind):  # type: ignore[valid-type,misc]
        spoil_loss = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = torch.randn(16, 6, generator=torch.Generator().manual_seed(batch_idx))
            if self.spoil_loss:
                x[:] = math.nan
            x = x[self.global_rank :: self.trainer.world_size] * (10.0 if batch_idx % 4 == 3 else 1.0)
            return (self.net(x) - x.sum(1, keepdim=True)).square().mean()

    return Spoiled


class Result(NamedTuple):
    """What a rank has seen: outcomes, events, how the fit ended, applied steps, and the whole weights."""

    outcomes: list[tuple[float, ...]]
    events: list[tuple[int, str]]
    ended: str
    applied: int
    weights: list[Tensor]


def fit(folder: Path, strategy: str, fault: str, reaction: str) -> Result:
    """Train.

    Args:
        folder: of the run.
        strategy: one of `STRATEGIES`.
        fault: one of `FAULTS`.
        reaction: ``"bare"`` clips at a norm that nothing reaches and skips; ``"skip"`` clips, too; ``"rollback"`` goes
            back when steps are skipped in a row; ``"halt"`` stops then; ``"fp16"`` has a loss scaler.
    """
    events, recorder = EventRecorder(), Recorder()
    stack: list[Any] = [ClipNorm(1e6 if reaction == "bare" else 0.5), SkipNonFinite(max_in_a_row=2), recorder, events]
    if reaction == "rollback":
        stack.append(Rollback(every=2, trust_after=1, max_rollbacks=2))
    times = {"skip": 1, "bare": 1, "fp16": 1, "rollback": 2, "halt": 100}[reaction]
    folder = folder / f"{strategy}-{fault}-{reaction}".replace(" ", "-")
    make = _spoiling(Hsdp if strategy == "hsdp" else two_ranks.Net)
    options: dict[str, Any] = {"accumulate_grad_batches": 3} if fault == "micro-batch" else {}
    if reaction == "fp16":
        options["fp16"] = True
        stack.append(ClipUnitwise(0.1))
    ended, weights = "", {}
    try:
        weights, _ = two_ranks.train(
            folder,
            STRATEGIES[strategy],
            *stack,
            Fault(fault, times),
            make_optimizer=zero if strategy == "zero1" else adamw,
            make=make,
            **options,
        )
    except TrainingStopped as stop:
        ended = str(stop)
    outcomes = [(o.loss, o.grad_norm, o.applied_norm, float(o.skipped)) for o in recorder.state]
    seen = [(event.step, event.kind) for event in events.events if event.plugin != "recorder"]
    applied = sum(not o.skipped for o in recorder.state)
    return Result(outcomes, seen, ended, applied, list(weights.values()))


def matrix(folder: Path, cases: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], Result]:
    return {case: fit(folder, *case) for case in cases}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, 0.01)


def zero(parameters: Any) -> torch.optim.Optimizer:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # its import warns

    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=0.01)


class Collectives(TorchDispatchMode):
    """Counts the collectives that this process takes part in."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        self.count += "c10d" in name and not name.endswith(("wait_tensor", "monitored_barrier_"))
        return func(*args, **(kwargs or {}))


def collectives_per_step(folder: Path, strategies: tuple[str, ...]) -> dict[str, dict[str, list[int]]]:
    """Of each strategy the collectives of each of the last steps of a fit, bare and with the default plugins."""
    return {
        strategy: {
            "bare": _collectives(folder, strategy),
            "default": _collectives(folder, strategy, *default_callbacks()),
        }
        for strategy in strategies
    }


def _collectives(folder: Path, strategy: str, *stack: Callback) -> list[int]:
    totals: list[int] = []
    counter = Collectives()
    count = LambdaCallback(on_train_batch_end=lambda *_: totals.append(counter.count))
    make_optimizer = zero if strategy == "zero1" else adamw
    with counter:
        two_ranks.train(
            folder, STRATEGIES[strategy], *stack, count, make_optimizer=make_optimizer, make=_spoiling(two_ranks.Net)
        )
    return [after - before for before, after in itertools.pairwise(totals)][2:]
