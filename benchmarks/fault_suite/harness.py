"""Train one contender in one condition, and apply the fault of each scenario to a copy of that run.

The copy is a fork of the process at the end of the step before the fault. So it is exact, including all state of the
plugins, and the healthy first part is trained only once. The process itself continues without a fault; this fault-free
twin is the reference for the damage.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import json_lines
import lightning as L
import torch
from json_lines import Record
from json_lines import append as append  # also for faults.py
from torch import Tensor

import stabletrain as st
from fault_suite.contenders import Contender
from fault_suite.scenarios import BATCH, CONDITIONS, FAULT_FREE, HEALTHY_RUNS, LENGTH, Condition, Scenario
from stabletrain import workloads
from stabletrain.workloads import CharGPT, ShakespeareData
from stabletrain.workloads.base import decay_groups

RATE, LR_WARMUP = 1e-2, 20
EVERY = 5
"""Attempted steps between two measurements of the held-out loss, from the step of the fault."""
LOST = 12
"""Number of consecutive non-finite measurements after which a run is ended: it cannot recover."""


class Trainee(CharGPT):
    """A small version of the recipe's model, which uses as many rows and characters of a batch as are set."""

    def __init__(self, long_tailed: bool, seed: int) -> None:
        super().__init__(layers=2, width=64, context=4 * LENGTH, lr=RATE, sample_length=0)
        self.length, self.rows = LENGTH, BATCH
        self.sizes = torch.Generator().manual_seed(seed) if long_tailed else None

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        rows = self.rows
        if self.sizes is not None:
            rows = max(1, min(4 * BATCH, round(BATCH / 2 * math.exp(torch.randn((), generator=self.sizes).item()))))
        seen = batch[:rows, : self.length + 1]
        return self.loss(self(seen[:, :-1]), seen[:, 1:])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Do not compute the mean training loss."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's AdamW, with ``foreach=True``, which launches fewer kernels."""
        return torch.optim.AdamW(decay_groups(self, self.weight_decay), lr=self.lr, betas=(0.9, 0.95), foreach=True)


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

    def on_stability_event(self, trainer: L.Trainer, module: L.LightningModule, event: Any) -> None:
        self.events.append((self.attempts, event.plugin, event.kind))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
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
                fault.on_fit_start(trainer, module)
                trainer.callbacks = [fault, *trainer.callbacks]  # type: ignore[attr-defined]
                return
            _, status = os.waitpid(child, 0)
            if status:
                raise RuntimeError(f"the copy for {scenario.name!r} ended with status {status}")

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


def clean_text(folder: Path) -> str:
    """Return the path of the shipped text, with runs of one character shortened to three."""
    path = folder / "clean.txt"
    if not path.exists():
        shipped = Path(workloads.__file__).parent / "data" / "shakespeare.txt.gz"
        characters = gzip.decompress(shipped.read_bytes()).decode("utf-8")
        path.write_text(re.sub(r"(\S)\1{3,}", r"\1\1\1", characters), encoding="utf-8")
    return str(path)


@torch.no_grad()
def held_out_loss(module: Any, windows: Tensor) -> float:
    """Return the loss in nats per character; draws no random numbers."""
    logits = module.net(windows[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def run(
    contender: Contender,
    condition: Condition,
    seed: int,
    forks: Sequence[Scenario],
    save: Callable[[Record], None],
    folder: Path,
    planned: Scenario | None = None,
) -> None:
    """Train once, and apply the fault of each scenario to a copy of the run.

    Args:
        contender: the protection.
        condition: the healthy run.
        seed: of weights, data and faults.
        forks: scenarios of this condition.
        save: called with each record when its run has ended.
        folder: for event logs.
        planned: scenario that is applied to the run itself; None: no fault.
    """
    L.seed_everything(seed, verbose=False)
    module = Trainee(condition.long_tailed, seed)
    data = ShakespeareData(
        path=clean_text(folder) if condition.clean else None,
        context=4 * LENGTH,
        batch_size=BATCH * (4 if condition.long_tailed else 1),
        seed=seed,
    )
    data.setup()
    held_out = next(iter(data.val_dataloader()))[:BATCH, : LENGTH + 1]
    trial = Trial(condition, seed, forks, held_out)
    faults = (
        [planned.make_fault(condition.fault, seed)] if planned is not None and planned.make_fault is not None else []
    )
    schedule = st.ScheduleLR(kind="constant", lr_warmup=LR_WARMUP)
    trainer = L.Trainer(
        max_steps=condition.steps,
        accelerator="cpu",
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        gradient_clip_val=contender.clip,
        callbacks=[*faults, schedule, *contender.build(), trial],
        **condition.trainer_options(),
    )
    ended = ""
    try:
        trainer.fit(module, data)
    except Exception as error:
        ended = f"{type(error).__name__} at {trial.attempts}: {error}"
    except BaseException:
        if trial.is_copy:
            os._exit(1)
        raise
    try:
        record = trial.record(module, ended)
        made = {"contender": contender.name, "condition": condition.name, "seed": seed, "setup": setup(condition)}
        save({**made, **record})
    finally:
        if trial.is_copy:
            sys.stdout.flush()
            os._exit(0)


def setup(condition: Condition) -> str:
    """Return the settings of a run, without its contender; records of other settings are ignored."""
    sizes = f"{BATCH} x {LENGTH}" + ", long-tailed" * condition.long_tailed + ", clean" * condition.clean
    return f"fault at {condition.fault} of {condition.steps}, {sizes}, rate {RATE:g} after {LR_WARMUP}, every {EVERY}"


def load(path: Path) -> list[Record]:
    """Return the records of a file with the present settings."""
    setups = {each.name: setup(each) for each in (*CONDITIONS, *(condition for condition, _, _ in HEALTHY_RUNS))}
    return [each for each in json_lines.read(path) if setups.get(each["condition"]) == each.get("setup")]
