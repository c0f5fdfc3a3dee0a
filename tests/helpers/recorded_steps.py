"""Fits that record their steps, for tests that kill them or run them on two ranks."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import torch
import two_ranks
from fits import NAN_LOSS, Net, Recorder, SkipHighLoss, batches, fit, loader
from lightning.pytorch import Callback, LightningModule, Trainer

from stabletrain import ClipNorm, Guard, RecordSteps, SkipNonFinite
from stabletrain.runtime.checkpoints.end_after import EndAfter
from stabletrain.runtime.records.record_losses import RecordLosses
from stabletrain.runtime.stop import EndReached

FAULTS = (0, 5, NAN_LOSS, 0, 4, 0, NAN_LOSS, 5, 0, 0)  # healthy, large gradient, high loss
ITEMS = batches(*FAULTS)


class Killed(Callback):
    """Ends the process by SIGKILL at the end of a batch, before the guard's own hook."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, o: Any, b: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def plugins(mode: Any = "exact") -> list[Any]:
    return [Recorder(), SkipNonFinite(), ClipNorm(max_norm=1.0), SkipHighLoss(), Guard(mode=mode)]


def train(path: Path, *callbacks: Callback, first: int = 0, mode: Any = "exact", **options: Any) -> tuple[Any, Any]:
    """Train on the batches from the first one on, which is that of a checkpoint; the outcomes, and the trainer."""
    members = plugins(mode)
    rest = loader(ITEMS[first:], sized=False) if first else ITEMS
    everybody = [*members, RecordSteps(path), *callbacks]
    mine = fit(Net("adamw-fused"), rest, *everybody, default_root_dir=path.parent, **options)
    return members[0].state, mine


def train_until_killed(folder: Path, batch: int) -> None:
    train(folder / "steps.bin", Killed(batch))


def on_two_ranks(folder: Path, guarded: bool) -> list[tuple[float, float]]:
    """Rank 1 alone sees a NaN; what each rank's guard has seen."""
    recorder, path = Recorder(), folder / f"steps-{guarded}-{os.environ['RANK']}.bin"
    members = [recorder, SkipNonFinite(), RecordSteps(path)] if guarded else [RecordLosses(path)]
    two_ranks.train(folder, "ddp", *members, make_optimizer=_sgd)
    return [(each.loss, each.grad_norm) for each in recorder.state] if guarded else []


def ended_on_two_ranks(folder: Path, steps: int) -> int:
    """The attempted steps of a fit that `EndAfter` has ended, as this rank has seen them."""
    recorder = Recorder()
    with contextlib.suppress(EndReached):
        two_ranks.train(folder, "ddp", recorder, SkipNonFinite(), EndAfter(steps), make_optimizer=_sgd)
    return len(recorder.state)


def _sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, 0.001)
