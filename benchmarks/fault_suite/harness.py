"""Train one contender in one condition, and apply the fault of each scenario to a copy of that run.

The copy is a fork of the process at the end of the step before the fault. So it is exact, including all state of the
plugins, and the healthy first part is trained only once. The process itself continues without a fault; this fault-free
twin is the reference for the damage.
"""

from __future__ import annotations

import gzip
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import json_lines
import lightning as L
from json_lines import Record
from json_lines import append as append  # also for faults.py

import stabletrain as st
from fault_suite.contenders import Contender
from fault_suite.healthy_runs import HEALTHY_RUNS
from fault_suite.other_faults import OTHER_CONDITIONS
from fault_suite.scenarios import BATCH, CONDITIONS, LENGTH, LR_WARMUP, Condition, Scenario
from fault_suite.trial import EVERY, Trainee, Trial
from stabletrain import workloads
from stabletrain.workloads import ShakespeareData


class WarmUp(L.Callback):
    """The warm-up of all contenders, for protections that change the learning rate: after it, no rate is set."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        if trainer.global_step < LR_WARMUP:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = pl_module.lr * ((trainer.global_step + 1) / LR_WARMUP)


def clean_text(folder: Path) -> str:
    """Return the path of the shipped text, with runs of one character shortened to three."""
    path = folder / "clean.txt"
    if not path.exists():
        shipped = Path(workloads.__file__).parent / "data" / "shakespeare.txt.gz"
        characters = gzip.decompress(shipped.read_bytes()).decode("utf-8")
        path.write_text(re.sub(r"(\S)\1{3,}", r"\1\1\1", characters), encoding="utf-8")
    return str(path)


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
    module = Trainee(condition, seed, contender.make_optimizer)
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
    schedule = WarmUp() if contender.is_peer else st.ScheduleLR(kind="constant", lr_warmup=LR_WARMUP)
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
    sizes += ", fp16" * condition.fp16
    if condition.accumulate > 1:
        sizes += f", {condition.accumulate} micro-batches"
    rate = f"rate {condition.rate:g} after {LR_WARMUP}"
    return f"fault at {condition.fault} of {condition.steps}, {sizes}, {rate}, every {EVERY}"


def load(path: Path) -> list[Record]:
    """Return the records of a file with the present settings."""
    healthy = (condition for condition, _, _ in HEALTHY_RUNS)
    setups = {each.name: setup(each) for each in (*CONDITIONS, *OTHER_CONDITIONS, *healthy)}
    return [each for each in json_lines.read(path) if setups.get(each["condition"]) == each.get("setup")]
