"""Trains one contender in one condition, and lets every scenario strike a copy of that run.

The copy is a fork of the process at the end of the step before the fault: exact, whatever a plugin remembers, and the
healthy first half is trained once. The process itself goes on without a fault and is the twin that damage is
measured against.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

import stabletrain as st
from fault_suite.contenders import Contender
from fault_suite.scenarios import BATCH, CONDITIONS, FAULT_FREE, HEALTHY_RUNS, LENGTH, Condition, Scenario
from stabletrain import workloads
from stabletrain.workloads import CharGPT, ShakespeareData
from stabletrain.workloads.base import decay_groups

RATE, LR_WARMUP = 1e-2, 20
EVERY = 5
"""Attempted steps between two measurements of the held-out loss, from the fault on."""
LOST = 12
"""Measurements in a row without a number after which a run is given up: nothing will bring it back."""
Record = dict[str, Any]


class Trainee(CharGPT):
    """The recipe's model, small, reading as much of each batch as the scenario says."""

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
        """No statistics of its own."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As the recipe's, with fewer kernels to start."""
        return torch.optim.AdamW(decay_groups(self, self.weight_decay), lr=self.lr, betas=(0.9, 0.95), foreach=True)


class Trial(L.Callback):
    """Last in the list: notes every attempted step, forks at the fault, measures afterwards, ends the run.

    Args:
        condition: the run.
        seed: of the faults.
        forks: scenarios that are to strike a copy of it.
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
        self._note_step(trainer)
        step, self.attempts = self.attempts, self.attempts + 1
        if step >= self.condition.fault and (step - self.condition.fault) % EVERY == EVERY - 1:
            self.losses.append(held_out_loss(pl_module, self.held_out))
        if self.attempts == self.condition.fault and self.scenario == FAULT_FREE:
            self._fork(trainer, pl_module)
        lost = len(self.losses) >= LOST and not any(map(math.isfinite, self.losses[-LOST:]))
        if lost or self.attempts >= self.condition.steps:
            trainer.should_stop = True

    def _note_step(self, trainer: L.Trainer) -> None:
        """By the global step, so that every contender is judged alike."""
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
                assert scenario.strike is not None
                fault = scenario.strike(self.condition.fault, self.seed)
                fault.on_fit_start(trainer, module)
                trainer.callbacks = [fault, *trainer.callbacks]  # type: ignore[attr-defined]
                return
            _, status = os.waitpid(child, 0)
            if status:
                raise RuntimeError(f"the copy for {scenario.name!r} ended with status {status}")

    def record(self, module: L.LightningModule, ended: str) -> Record:
        """Everything that judging needs."""
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
    """A file with the shipped text, where no character follows itself more than twice."""
    path = folder / "clean.txt"
    if not path.exists():
        shipped = Path(workloads.__file__).parent / "data" / "shakespeare.txt.gz"
        characters = gzip.decompress(shipped.read_bytes()).decode("utf-8")
        path.write_text(re.sub(r"(\S)\1{3,}", r"\1\1\1", characters), encoding="utf-8")
    return str(path)


@torch.no_grad()
def held_out_loss(module: Any, windows: Tensor) -> float:
    """Nats per character; no random number is drawn."""
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
    """Train once, with a copy struck by each scenario; records go to ``save`` as they are made.

    Args:
        contender: who protects.
        condition: the healthy run.
        seed: of weights, data and faults.
        forks: scenarios of this condition.
        save: takes each record.
        folder: for event logs.
        planned: what happens to the run itself.
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
    faults = [planned.strike(condition.fault, seed)] if planned is not None and planned.strike is not None else []
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
    """What a run depends on besides its contender: records of another setup do not count."""
    sizes = f"{BATCH} x {LENGTH}" + ", long-tailed" * condition.long_tailed + ", clean" * condition.clean
    return f"fault at {condition.fault} of {condition.steps}, {sizes}, rate {RATE:g} after {LR_WARMUP}, every {EVERY}"


def append(path: Path, record: Record) -> None:
    """Add one line to a file of JSON lines."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def load(path: Path) -> list[Record]:
    """The records of a file that are of this setup; a line cut short by an interruption is left out."""
    setups = {each.name: setup(each) for each in (*CONDITIONS, *(condition for condition, _, _ in HEALTHY_RUNS))}
    records = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if setups.get(record["condition"]) == record.get("setup"):
            records.append(record)
    return records
