"""The model that is trained, and the callback that measures a run and applies faults to copies of it."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from json_lines import Record
from torch import Tensor
from torch.optim import Optimizer

from fault_suite.injected import BadShard, digest
from fault_suite.scenarios import BATCH, FAULT_FREE, LENGTH, Condition, Scenario
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.workloads import CharGPT

EVERY = 5
"""Attempted steps between two measurements of the held-out loss, from the step of the fault."""
LOST = 12
"""Number of consecutive non-finite measurements after which a run is ended: it cannot recover."""
MakeOptimizer = Callable[[L.LightningModule, list[dict[str, Any]], dict[str, Any]], Optimizer]
"""Makes an optimizer from the module, its parameter groups, and the arguments ``lr`` and ``betas``."""


def adamw(module: L.LightningModule, groups: list[dict[str, Any]], arguments: dict[str, Any]) -> Optimizer:
    """Return the recipe's AdamW, with ``foreach=True``, which launches fewer kernels."""
    return torch.optim.AdamW(groups, foreach=True, **arguments)


class Trainee(CharGPT):
    """A small version of the recipe's model, which uses as many rows and characters of a batch as are set."""

    def __init__(self, condition: Condition, seed: int, make_optimizer: MakeOptimizer = adamw) -> None:
        super().__init__(layers=2, width=64, context=4 * LENGTH, lr=condition.rate, sample_length=0)
        self.make_optimizer = make_optimizer
        self.length, self.rows = LENGTH, BATCH
        self.sizes = torch.Generator().manual_seed(seed) if condition.long_tailed else None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        rows = self.rows
        if self.sizes is not None:
            rows = max(1, min(4 * BATCH, round(BATCH / 2 * math.exp(torch.randn((), generator=self.sizes).item()))))
        seen = batch[:rows, : self.length + 1]
        return self.loss(self(seen[:, :-1]), seen[:, 1:])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Do not compute the mean training loss."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The contender's optimizer, with the recipe's arguments.

        Parameters decay by their shape, as in the record; the recipe has come to decide it by what they belong to.
        """
        matrices, others = ([p for p in self.parameters() if (p.ndim > 1) is large] for large in (True, False))
        groups = [{"params": matrices, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return self.make_optimizer(self, groups, {"lr": self.lr, "betas": (0.9, 0.95)})


@torch.no_grad()
def held_out_loss(module: Any, windows: Tensor) -> float:
    """Return the loss in nats per character; draws no random numbers."""
    logits = module.net(windows[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


class Trial(L.Callback):
    """Records every attempted step, forks before the fault, measures the held-out loss from then on, and ends the run.

    It must be the last callback in the list.

    Args:
        condition: the condition of the run.
        seed: of the faults.
        forks: scenarios whose faults are applied to copies of the run.
        held_out: windows on which the loss is measured.
    """

    def __init__(self, condition: Condition, seed: int, forks: Sequence[Scenario], held_out: Tensor) -> None:
        self.condition, self.seed, self.forks, self.held_out = condition, seed, forks, held_out
        self.scenario = FAULT_FREE
        self.attempts = self.wasted = 0
        self.losses: list[float] = []
        self.excluded: list[int] = []
        self.rollbacks: list[int] = []
        self.events: list[tuple[int, str, str]] = []
        self._applied = 0
        self._scale = 0.0
        self._start = time.perf_counter()
        self.is_copy = False
        self.seen: set[int] = set()
        """Digests of the batches before the fault."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.attempts < self.condition.fault and self.forks:
            self.seen.add(digest(batch))

    def on_stability_event(self, trainer: L.Trainer, module: L.LightningModule, event: Any) -> None:
        self.events.append((self.attempts, event.plugin, event.kind))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if AccumulationWindow(trainer).is_open:
            return  # steps are counted, not micro-batches
        self._record_step(trainer)
        step, self.attempts = self.attempts, self.attempts + 1
        if step >= self.condition.fault and (step - self.condition.fault) % EVERY == EVERY - 1:
            self.losses.append(held_out_loss(pl_module, self.held_out))
        if self.attempts == self.condition.fault and self.scenario == FAULT_FREE:
            self._fork(trainer, pl_module)
        lost = len(self.losses) >= LOST and not any(map(math.isfinite, self.losses[-LOST:]))
        if lost or self.attempts >= self.condition.steps:
            trainer.should_stop = True

    def _record_step(self, trainer: L.Trainer) -> None:
        """Detect skips and rollbacks from the global step, in the same way for every contender."""
        applied, scaler = trainer.global_step, getattr(trainer.precision_plugin, "scaler", None)
        scale = scaler.get_scale() if scaler is not None else 0.0
        gained, overflow = applied - self._applied, scale < self._scale
        self._applied, self._scale = applied, scale
        self.wasted += 1 - (0 if overflow else gained)
        if gained < 0:
            self.rollbacks.append(self.attempts)
        elif gained == 0 and not overflow:
            self.excluded.append(self.attempts)

    def _fork(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for scenario in self.forks:
            sys.stdout.flush()
            child = os.fork()
            if not child:
                self.scenario, self.is_copy = scenario.name, True
                self._start = time.perf_counter()
                assert scenario.make_fault is not None
                fault = scenario.make_fault(self.condition.fault, self.seed)
                if isinstance(fault, BadShard):
                    fault.healthy = self.seen
                fault.on_fit_start(trainer, module)
                trainer.callbacks = [fault, *trainer.callbacks]  # type: ignore[attr-defined]
                return
            _, status = os.waitpid(child, 0)
            if status:
                raise RuntimeError(f"the copy for {scenario.name!r} ended with status {status}")
        if self.forks and all(scenario.figure == "loss" for scenario in self.forks):
            trainer.should_stop = True  # no figure needs the twin

    def record(self, module: L.LightningModule, ended: str) -> Record:
        """Return the record of the run, from which the figures are computed."""
        final = self.losses[-1] if self.losses else math.nan
        finite = (math.isfinite(final) or not self.losses) and all(
            bool(p.isfinite().all()) for p in module.parameters()
        )
        return {
            "scenario": self.scenario,
            "ended": ended or ("" if finite else f"not finite at {self.attempts - 1}"),
            "attempts": self.attempts,
            "wasted": self.wasted,
            "skips": self.excluded,
            "rollbacks": self.rollbacks,
            "events": [event for event in self.events if event[2] not in ("skip", "nonfinite")],
            "losses": [round(x, 5) if math.isfinite(x) else None for x in self.losses],
            "seconds": round(time.perf_counter() - self._start, 2),
        }
