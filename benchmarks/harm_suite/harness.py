"""One run: a case, a protection and a seed."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
import warnings
from collections import Counter
from typing import Any

import lightning as L
import torch
from json_lines import Record

from harm_suite.fingerprint import fingerprint
from harm_suite.stacks import Stack
from harm_suite.training import Case, Training
from stabletrain.runtime.guard.callbacks import GuardMember


class Attempts(L.Callback):
    """Ends a run after so many attempted steps, and counts events by their kind; the last callback in the list."""

    def __init__(self, steps: int) -> None:
        self.steps, self.attempts = steps, 0
        self.events: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def on_stability_event(self, trainer: L.Trainer, module: L.LightningModule, event: Any) -> None:
        self.events[event.kind] += 1
        self.first.setdefault(event.kind, f"{event.step}: {event.reason[:160]}")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.attempts += 1
        if self.attempts >= self.steps:
            trainer.should_stop = True


def run(case: Case, stack: Stack, seed: int) -> Record:
    """Train once and return the record.

    The same seed gives the same weights, data and random numbers with every stack. A run counts as stopped if it ends
    by an exception or before its attempted steps are done. ``seconds`` are of processor time.

    Args:
        case: what is trained.
        stack: its protection.
        seed: of weights, data and everything random in training.
    """
    start = time.process_time()
    L.seed_everything(seed, verbose=False)
    training = case.make(seed)
    before = measure(training)
    attempts, callbacks = Attempts(training.steps), stack.build()
    torch.manual_seed(seed)
    ended = ""
    with tempfile.TemporaryDirectory(prefix="harm-") as folder:
        trainer = L.Trainer(
            max_steps=training.steps,
            max_epochs=-1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[*callbacks, attempts],
            **training.options,
        )
        try:
            trainer.fit(training.task, training.data)
        except Exception as error:
            ended = f"{type(error).__name__} at {attempts.attempts}: {str(error)[:300]}"
    if not ended and attempts.attempts < training.steps:
        ended = f"ended after {attempts.attempts} of {training.steps} attempted steps"
    members = [each for each in callbacks if isinstance(each, GuardMember)]
    guard = members[0]._guard if members else None
    return {
        **key(case, stack.name, seed),
        "metric": measure(training),
        "before": before,
        "least": training.least,
        "attempts": attempts.attempts,
        "skipped": guard.counters.skipped if guard else 0,
        "clipped": guard.counters.clipped if guard else 0,
        "rollbacks": attempts.events["rollback"],
        "accepted": attempts.events["accept"],
        "ended": ended,
        "first": attempts.first,
        "seconds": round(time.process_time() - start, 2),
    }


def key(case: Case, stack: str, seed: int) -> Record:
    """Return what a record is known by; ``setup`` makes a run of a changed case another one."""
    return {"case": case.name, "stack": stack, "seed": seed, "setup": fingerprint(case.make)}


@torch.no_grad()
def measure(training: Training) -> float | None:
    """Return the metric; None if it is not finite, which JSON has no number for."""
    training.task.eval()
    value = float(training.metric(training.task))
    training.task.train()
    return value if math.isfinite(value) else None


def quiet() -> None:
    """Silence the libraries, and use one thread: call it once in a process that runs trainings."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
