"""Does anything grow in a long run? The default stack over many steps: time, memory, and what is stored, along the way.

    python benchmarks/growth.py                    200,000 steps (about 6 minutes)
    python benchmarks/growth.py --steps 20000
    python benchmarks/growth.py --write            also write benchmarks/results/growth.md

A tiny MLP is trained on batches of which one in 97 has a wrong label and one in 499 a NaN, so that steps are clipped,
dropped and reported all the time; with worker processes none, and a sampler, so that the samples of dropped steps are
counted. At several places the time of a step (8 % quantile of 2,000), the resident memory, the size of the checkpointed
state of all callbacks (as JSON) and of events.jsonl are read.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning as L
import psutil
import torch
from machine import measured
from overhead_suite.training import TinyMLP
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import stabletrain as st
from stabletrain.runtime.records import run_files

PAGE = Path(__file__).parent / "results" / "growth.md"
TIMED = 2000
WRONG, NAN = 97, 499
SAMPLES = 8192


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """Rows with wrong labels and NaN among them, the same in each epoch."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(SAMPLES, 4, 8, generator=generator)
        self.y = self.x.sum(-1, keepdim=True) * 0.1 + torch.randn(SAMPLES, 4, 1, generator=generator)
        self.y[WRONG - 1 :: WRONG] *= 300.0
        self.y[NAN - 1 :: NAN] = float("nan")

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Reading(NamedTuple):
    """What is read at one place of the run.

    Args:
        step: attempted steps so far.
        microseconds: of a step.
        resident: memory of the process, MB.
        objects: that Python's garbage collector knows, thousands.
        state: size of the callbacks' state in a checkpoint, kB.
        events: size of events.jsonl, kB.
    """

    step: int
    microseconds: float
    resident: float
    objects: float
    state: float
    events: float


class Watch(L.Callback):
    """Reads at evenly spaced steps.

    Args:
        steps: of the run.
        folder: with events.jsonl.
    """

    def __init__(self, steps: int, folder: Path) -> None:
        self._places = {steps * i // 8 for i in range(1, 9)} | {min(2 * TIMED, steps // 8)}
        self._folder = folder
        self._times: list[int] = []
        self._last = 0
        self.readings: list[Reading] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        now = time.perf_counter_ns()
        self._times.append(now - self._last)
        del self._times[:-TIMED]
        step = trainer.fit_loop.total_batch_idx + 1
        if step in self._places:
            self.readings.append(self._read(trainer, step))
        trainer.should_stop = step >= max(self._places)
        self._last = time.perf_counter_ns()

    def _read(self, trainer: L.Trainer, step: int) -> Reading:
        gc.collect()
        events = self._folder / run_files.EVENTS
        state = json.dumps([each.state_dict() for each in trainer.callbacks], default=_plain)  # type: ignore[attr-defined]
        return Reading(
            step,
            sorted(self._times)[len(self._times) * 8 // 100] / 1e3,
            psutil.Process().memory_info().rss / 1e6,
            len(gc.get_objects()) / 1e3,
            len(state) / 1e3,
            events.stat().st_size / 1e3 if events.exists() else 0.0,
        )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else repr(value)


def train(steps: int, folder: Path) -> list[Reading]:
    torch.manual_seed(0)
    watch = Watch(steps, folder)
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        max_epochs=steps // SAMPLES + 1,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=[*st.default_callbacks(), st.ResumeExactly(), watch],
        **quiet,
    )
    loader = DataLoader(Rows(), batch_size=None, shuffle=True)
    trainer.fit(TinyMLP(), loader)
    return watch.readings


def table(readings: list[Reading]) -> str:
    lines = [
        "| batches | µs a step | resident memory, MB | objects, thousands | state of callbacks, kB | events.jsonl, kB |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for r in readings:
        lines.append(
            f"| {r.step:,} | {r.microseconds:.0f} | {r.resident:.1f} | {r.objects:.1f} | {r.state:.1f} | "
            f"{r.events:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/growth.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "stabletrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        text = table(train(arguments.steps, Path(folder)))
    print(text)
    if arguments.write:
        PAGE.write_text(
            f"# What grows in a long run\n\n{measured()}; the machine was shared.\n\n"
            f"    python benchmarks/growth.py --steps {arguments.steps} --write\n\n{text}\n\n"
            "The number of events is that of dropped and reported steps; their file has a bound of its own, 64 MiB.\n"
        )


if __name__ == "__main__":
    main()
