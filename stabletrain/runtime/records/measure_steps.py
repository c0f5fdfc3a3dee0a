"""`MeasureSteps`: train some steps, write how long each took, and end the fit."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.step_times import FEWEST, WARM_UP
from stabletrain.errors import UserError
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.records.run_files import STEP_TIMES
from stabletrain.runtime.stop import EndReached


class MeasureSteps(Callback):
    """Measure optimizer steps after some to warm up, data loading and plugins included, then end by `EndReached`.

    Writes ``step_times.json`` into the Trainer's default_root_dir: ``seconds`` of each step, ``device``, its name, and
    ``peak_flops``, operations per second of one device at the Trainer's precision as Lightning knows it, or null. A run
    that ends before has fewer steps in it.

    Args:
        steps: to measure, at least 5.
    """

    def __init__(self, steps: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < FEWEST:
            raise UserError(f"steps: expected a number of steps, at least {FEWEST}, got {steps!r}")
        self.steps = steps
        self._ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self._ends = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note when a step has ended; end the fit after the last one."""
        if AccumulationWindow(trainer).is_open:
            return
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._ends.append(time.perf_counter())
        if len(self._ends) >= WARM_UP + self.steps:
            self._write(trainer)
            raise EndReached(f"ended after {len(self._ends)} steps, as it was asked to")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run has ended before."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        device = trainer.strategy.root_device
        times = self._ends[WARM_UP - 1 :]
        content = {
            "seconds": [after - before for before, after in itertools.pairwise(times)],
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "peak_flops": _peak(device, str(trainer.precision)),
        }
        (Path(trainer.default_root_dir) / STEP_TIMES).write_text(json.dumps(content), encoding="utf-8")


def _peak(device: torch.device, precision: str) -> int | None:
    """Operations per second of a device, from Lightning's table; None: the device is not in it."""
    if device.type not in ("cuda", "xla"):
        return None
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    dtype = next((dtype for name, dtype in kinds.items() if precision.startswith(name)), torch.float32)
    return get_available_flops(device, dtype)
