"""``steps.bin`` of a run without plugins, where no guard measures: the losses alone."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.records.steps_file import Flag
from stabletrain.runtime.records.steps_record import StepsRecord, attempted_in

_KNOWN, _NO_LOSS = Flag.RECORDED.value, Flag.RECORDED.value | Flag.NO_LOSS.value
_READ_EVERY = 1.0
"""Seconds between two readings of losses on another device than the CPU."""


class RecordLosses(Callback):
    """Write the loss of every optimizer step to ``steps.bin``; the gradient norm is NaN, since nobody measures it.

    It changes nothing and calls no collective: the loss is that of rank 0, the mean over the micro-batches of its
    accumulation window. Losses on a GPU are read once in a second, all at once. With several optimizers (manual
    optimization) a step's loss is the mean over the backward passes since the last step of any of them.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._record: StepsRecord | None = None
        self._window: list[Tensor] = []
        self._unread: list[Tensor | None] = []
        """The losses of the last steps; None: the step had none."""
        self._step = 0
        self._attempted = 0
        """Steps before the resume, if a guard has counted them."""
        self._global_step = -1
        self._scaler: torch.amp.GradScaler | None = None
        self._is_automatic = True
        self._read_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let Lightning skip the hooks that are not used."""
        trainer_internals.silence_step_hooks(self, among=Callback)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the numbers of a run with plugins, which count dropped steps, too."""
        self._attempted = attempted_in(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The number of the first step is known."""
        writes = trainer.is_global_zero and not trainer_internals.is_fast_dev_run(trainer)
        self._record = StepsRecord(self._path) if writes else None
        self._step = max(trainer.global_step, self._attempted)
        self._global_step = -1
        self._scaler = trainer_internals.grad_scaler(trainer)
        self._is_automatic = pl_module.automatic_optimization
        if self._record is not None:
            self._record.begin(self._step)
        self._window, self._unread = [], []

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss of a micro-batch, divided by the window's size and multiplied by the loss scale."""
        loss = loss.detach().reshape(()) if loss.ndim else loss.detach()
        self._window.append(
            loss if self._is_automatic else loss.clone()
        )  # by hand, the module may change it afterwards

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count a step."""
        window, self._window = self._window, []
        if self._record is None or trainer_internals.skips_backward(trainer):
            return
        if trainer.global_step == self._global_step:  # a further call of the closure in one step, as LBFGS makes them
            return
        self._global_step = trainer.global_step
        self._unread.append(self._mean(trainer, window) if window else None)
        if not window or not window[0].is_cpu:
            now = time.monotonic()
            if now < self._read_at:
                return
            self._read_at = now + _READ_EVERY
            newest, self._unread = self._unread[-1:], self._unread[:-1]  # which the device is still computing
            self._read()
            self._unread = newest
            return
        self._read()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the steps so far."""
        self._flush()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]) -> None:
        """Write the steps so far; nothing is added to the checkpoint."""
        self._flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the steps so far."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the steps so far, unless the device is what has failed."""
        with contextlib.suppress(RuntimeError):
            self._flush()
        self._unread = []
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the hooks."""
        trainer_internals.restore_step_hooks(self)

    def _read(self) -> None:
        """Read the losses of the last steps from their device, and write them."""
        if self._record is None or not self._unread:
            return
        unread, self._unread = self._unread, []
        there = [loss for loss in unread if loss is not None]
        values = iter(torch.stack([loss.double() for loss in there]).tolist() if len(there) > 1 else map(float, there))
        for loss in unread:
            known = loss is not None
            value, flags = (next(values), _KNOWN) if known else (math.nan, _NO_LOSS)
            self._record.append(self._step, value, math.nan, flags)
            self._step += 1

    def _flush(self) -> None:
        self._read()
        if self._record is not None:
            self._record.flush()

    def _close(self) -> None:
        self._flush()
        if self._record is not None:
            self._record.close()

    def _mean(self, trainer: Trainer, window: list[Tensor]) -> Tensor:
        """The mean loss of a window, unscaled, computed as the guard does."""
        loss = window[0] if len(window) == 1 else torch.stack(window).mean()
        size = trainer.accumulate_grad_batches if self._is_automatic else 1
        if self._scaler is not None:
            return loss * (size / trainer_internals.scale_on_device(self._scaler))
        return loss if size == 1 else loss * size
