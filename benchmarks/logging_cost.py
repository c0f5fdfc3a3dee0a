"""What the record of a run costs the training loop, and how many metrics a second reach MLflow's database.

    python benchmarks/logging_cost.py [--write]        (about a minute on 2 cores)

Everything that a recipe adds to a step is called many times within a training of a tiny network, by itself:
`RecordSteps` as the guard calls it, and the hooks of `MeasureThroughput` and `RecordLosses` as Lightning calls them.
The time is that of the training thread alone (CPU time), the best of several rounds, so that other work on the machine
counts less. "Sustained" is the time until all metrics are in the database.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer import call
from machine import measured
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabletrain import RecordSteps, SkipNonFinite
from stabletrain.core.outcome import Outcome
from stabletrain.launch.throughput import MeasureThroughput
from stabletrain.runtime.records.record_losses import RecordLosses
from stabletrain.tracking import MLflowLogger

ROUNDS, CALLS = 9, 2000
PAGE = Path(__file__).parent / "results" / "logging_cost.md"


class Net(L.LightningModule):
    """A tiny network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def microseconds(action: Callable[[], object], calls: int = CALLS) -> float:
    """CPU time of one call in the best round."""
    best = float("inf")
    for _ in range(ROUNDS):
        started = time.thread_time()
        for _ in range(calls):
            action()
        best = min(best, (time.thread_time() - started) / calls)
    return best * 1e6


class Probe(L.Callback):
    """Measures within a training."""

    def __init__(self, steps: RecordSteps, throughput: MeasureThroughput, losses: RecordLosses) -> None:
        self.steps, self.throughput, self.losses = steps, throughput, losses
        self.found: dict[str, float] = {}

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx != 50:
            return
        number = iter(range(10**9))
        record = self.steps.on_attempt
        self.found["`RecordSteps`: a step"] = microseconds(lambda: record(Outcome(next(number), 2.0, 1.0, 1.0, 1.0)))
        everybody, loss = trainer.callbacks, torch.tensor(2.0)

        def hooks(*callbacks: L.Callback) -> float:
            trainer.callbacks = list(callbacks)
            calls = (("on_train_batch_start", (batch, 0)), ("on_before_backward", (loss,)))
            calls += (("on_before_optimizer_step", (trainer.optimizers[0],)),)
            total = 0.0
            for name, arguments in calls:
                total += microseconds(lambda name=name, more=arguments: call._call_callback_hooks(trainer, name, *more))
            trainer.callbacks = everybody
            return total

        empty = hooks()
        fetching = microseconds(lambda: (self.throughput._fetching(), self.throughput._fetched()))
        self.found["`MeasureThroughput`: a micro-batch"] = hooks(self.throughput) - empty + fetching
        self.found["without plugins, `RecordLosses`: a step"] = hooks(self.losses) - empty


def training(folder: Path) -> dict[str, float]:
    """What is measured within a training."""
    callbacks = [RecordSteps(folder / "a.bin"), MeasureThroughput(), RecordLosses(folder / "b.bin")]
    probe = Probe(*callbacks)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, callbacks=[SkipNonFinite(), *callbacks, probe], logger=False, **quiet)
    trainer.fit(Net(), DataLoader(torch.randn(52, 1, 8), batch_size=None))
    return probe.found


def tracking(folder: Path, number: int = 50_000) -> tuple[float, float]:
    """CPU microseconds of the caller for ten metrics; metrics per second that reach the database."""
    logger = MLflowLogger(f"sqlite:///{folder}/mlflow.db", save_dir=folder)
    metrics = {f"metric/{i}": float(i) for i in range(10)}
    logger.log_metrics(metrics, step=0)
    logger.flush()
    started, calls = time.perf_counter(), number // len(metrics) // ROUNDS
    step = itertools.count(1)  # equal points would be stored once
    caller = microseconds(lambda: logger.log_metrics(metrics, step=next(step)), calls)
    assert logger.flush(600)
    rate = calls * ROUNDS * len(metrics) / (time.perf_counter() - started)
    logger.finalize("success")
    return caller, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name}")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        found = training(Path(scratch))
        caller, rate = tracking(Path(scratch))
    found["`MLflowLogger.log_metrics`, ten metrics, every 10 steps: a step"] = caller / 10
    rows = [(name, f"{value:.2f} µs", "") for name, value in found.items()]
    total = sum(value for name, value in found.items() if "without" not in name)
    rows.append(("all of them, with plugins", f"{total:.2f} µs per step", "at most 10 µs"))
    rows.append(("metrics that reach SQLite, sustained", f"{rate:.0f} per second", "at least 5000"))
    how = f"CPU time of the training thread, the best of {ROUNDS} rounds"
    text = f"# The cost of the record\n\n{measured()}. {how}.\n\n"
    text += "    python benchmarks/logging_cost.py --write\n\n| what | measured | required |\n|---|---|---|\n"
    text += "".join(f"| {' | '.join(row)} |\n" for row in rows)
    print(text)
    if chosen.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
