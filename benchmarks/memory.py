"""Memory that rollback takes above the bare run, against what it announces, and the time of its snapshots and checks.

    python benchmarks/memory.py            prints the table
    python benchmarks/memory.py --write    also write benchmarks/results/memory.md

A fit of an MLP with 60 million parameters and AdamW, on the CPU, for each case in a process of its own: its peak is the
high-water mark of the resident memory that the operating system has counted. Snapshots are in main memory, every 5
steps so that the ring is full early; three are kept. In the last cases a batch has 10 MB; room is announced for twice
as many batches as a run without an incident keeps.

The times are medians within the same run: of a whole step, of taking a snapshot and of a check of the weights. Their
share of the step's time is given for the default intervals (a snapshot every 25 steps, a check every 10).
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from machine import measured
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stabletrain import Rollback
from stabletrain.runtime.records.event_log import logger
from stabletrain_plugins.rollback.memory import MemoryPlan
from stabletrain_plugins.rollback.snapshot_ring import SnapshotRing
from stabletrain_plugins.rollback.weight_monitor import WeightMonitor

STEPS, EVERY, KEEP, WIDTH = 40, 5, 3, 3873
CASES: dict[str, tuple[dict[str, Any] | None, int]] = {
    "bare": (None, 1),
    "rollback": ({}, 1),
    "bare, batches of 10 MB": (None, 650),
    "rollback, batches of 10 MB": ({}, 650),
    "rollback with `tape: indices`, batches of 10 MB": ({"tape": "indices"}, 650),
}


class Rows(Dataset[Tensor]):
    """Rows that are computed from their index, so that the data themselves take no memory."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return STEPS * 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.full((self.rows, WIDTH // 4), float(index % 7))


class Net(L.LightningModule):
    """60 million parameters in four layers, trained on the first row of each sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4)))
        self.times: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.times.append(time.perf_counter())
        rows = nn.functional.pad(batch[:, 0], (0, WIDTH - batch.shape[-1]))
        return (self.net(rows) - 0.1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4, fused=True)


def timed(owner: type, name: str) -> list[float]:
    """Note the seconds of every call of a method from now on."""
    call: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - start)

    setattr(owner, name, wrapped)
    return seconds


class Announced(logging.Handler):
    """Keeps the plan that rollback announces."""

    plan: MemoryPlan | None = None

    def emit(self, record: logging.LogRecord) -> None:
        for each in record.args or ():
            if isinstance(each, MemoryPlan):
                self.plan = each


def run(case: str) -> dict[str, Any]:
    """One fit, in this process."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    announced = Announced()
    logger.addHandler(announced)
    logger.setLevel(logging.INFO)
    arguments, rows = CASES[case]
    snapshots, looks = timed(SnapshotRing, "capture"), timed(WeightMonitor, "check")
    callbacks: list[L.Callback] = []
    if arguments is not None:
        callbacks.append(Rollback(every=EVERY, keep=KEEP, trust_after=EVERY, check_every=10, **arguments))
    model = Net()
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, callbacks=callbacks, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Rows(rows), 4))
    steps = [after - before for before, after in zip(model.times, model.times[1:], strict=False)]
    return {
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "announced": announced.plan.memory if announced.plan else 0,
        "step": statistics.median(steps),
        "snapshot": statistics.median(snapshots[1:] or [0.0]),
        "look": statistics.median([each for each in looks if each > 1e-3] or [0.0]),
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [
        "| case | peak, MB | above bare | announced | seen / announced | step, ms | snapshot, ms | check, ms | share |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case, row in found.items():
        bare = found["bare, batches of 10 MB" if "10 MB" in case else "bare"]
        cells = [case, f"{row['peak'] / 1e6:.0f}"]
        if row is bare:
            cells += ["", "", "", f"{row['step'] * 1e3:.0f}", "", "", ""]
        else:
            above = row["peak"] - bare["peak"]
            share = (row["snapshot"] / 25 + row["look"] / 10) / bare["step"]
            cells += [f"{above / 1e6:.0f}", f"{row['announced'] / 1e6:.0f}", f"{above / row['announced']:.3f}"]
            cells += [f"{row[key] * 1e3:.0f}" for key in ("step", "snapshot", "look")] + [f"{share:.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/memory.md")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(run(options.case)))
        return
    found = {}
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, found[case], flush=True)
    print(table(found))
    if options.write:
        page = Path(__file__).parent / "results" / "memory.md"
        page.write_text(
            f"# Memory of rollback\n\n    python benchmarks/memory.py --write\n\n{measured()}.\n\n{table(found)}\n"
        )


if __name__ == "__main__":
    main()
