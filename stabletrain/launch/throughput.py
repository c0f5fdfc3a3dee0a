"""How fast a run trains: ``throughput/...``, measured on the host without waiting for the device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.metric_names import MetricInfo
from stabletrain.runtime.guard.publishing import publish
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.windows.batches import samples_and_tokens

METRICS = (
    MetricInfo("throughput/step_s", "seconds", "per attempted step since the last point, without validation"),
    MetricInfo("throughput/samples_per_s", "1/s", "rows of the batches' first tensors, times the ranks that read data"),
    MetricInfo("throughput/tokens_per_s", "1/s", "their elements, if they are matrices of whole numbers (token ids)"),
    MetricInfo("throughput/data_wait_share", "0 to 1", "share of that time in which the loop waited for a batch"),
    MetricInfo("throughput/peak_memory_mib", "MiB", "most memory of rank 0 so far: of its GPU by torch, else resident"),
)
_PAUSE = 0.5
"""Seconds of training between two points, at least: of very short steps, a point would cost more than they do."""


class MeasureThroughput(Callback):
    """Log the speed of the training every ``log_every_n_steps`` steps, but at most twice a second.

    Times are those of the host: on a GPU, where it runs ahead, they are right as means over many steps.
    """

    def __init__(self) -> None:
        self._undo: Callable[[], None] | None = None
        self._since: float | None = None
        """When the time that is measured began, or went on; None before the first batch."""
        self._clear(0)

    def _clear(self, step: int) -> None:
        self._first, self._elapsed, self._waited = step, 0.0, 0.0
        self._samples = self._tokens = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning skip the hooks that are not used."""
        trainer_internals.silence_step_hooks(self, among=Callback)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure how long the loop waits for batches."""
        self._restore()
        self._undo = loader_internals.around_fetching(trainer, self._fetching, self._fetched)
        self._every = trainer_internals.log_interval(trainer)
        self._since = None
        self._readers = 1 if loader_internals.all_ranks_read_alike(trainer) else trainer.world_size
        self._clear(trainer_internals.logger_step(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log, if it is time, and count the batch that begins."""
        now = time.perf_counter()
        step = trainer_internals.logger_step(trainer)
        if self._since is not None:
            self._elapsed += now - self._since
            if self._elapsed >= _PAUSE and step - self._first >= self._every:
                self._publish(trainer, step)
        else:
            self._waited = 0.0  # for the first batch of all, before the time began
        self._since = now
        samples, tokens = samples_and_tokens(batch)
        self._samples += samples or 0
        self._tokens += tokens or 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The time stands still."""
        if self._since is not None:
            self._elapsed += time.perf_counter() - self._since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The time goes on."""
        if self._since is not None:
            self._since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the last steps."""
        if self._since is not None:
            self._elapsed += time.perf_counter() - self._since
            step = trainer_internals.logger_step(trainer)
            if step > self._first:
                self._publish(trainer, step)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the loop."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the hooks."""
        self._restore()
        trainer_internals.restore_step_hooks(self)

    def _publish(self, trainer: Trainer, step: int) -> None:
        seconds = max(self._elapsed, 1e-9)
        found = {
            "step_s": seconds / (step - self._first),
            "data_wait_share": min(1.0, self._waited / seconds),
            "peak_memory_mib": _peak_memory(trainer) / 2**20,
        }
        if self._samples:
            found["samples_per_s"] = self._samples * self._readers / seconds
        if self._tokens:
            found["tokens_per_s"] = self._tokens * self._readers / seconds
        publish(trainer, {f"throughput/{name}": value for name, value in found.items()}, {}, step=step - 1)
        self._clear(step)

    def _fetching(self) -> None:
        self._fetch_began = time.perf_counter()

    def _fetched(self) -> None:
        self._waited += time.perf_counter() - self._fetch_began

    def _restore(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None


def _peak_memory(trainer: Trainer) -> int:
    """Bytes."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with suppress(OSError, StopIteration, ValueError):  # getrusage counts the process before its exec, too
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
