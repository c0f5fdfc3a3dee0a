"""The fp16 loss scaler of a fit: all access of the guard to it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch.optim import Optimizer

from stabletrain.runtime.guard.metrics import Counters
from stabletrain.runtime.internals import trainer as trainer_internals


class LossScaling:
    """The active GradScaler of the precision plugin; without one, the scale is 1 and all methods do nothing.

    Args:
        trainer: in a fit, with its precision plugin set up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._scaler: torch.amp.GradScaler | None = trainer_internals.grad_scaler(trainer)
        self._frozen: dict[str, Any] | None = None
        self.is_active = self._scaler is not None
        """Whether losses are scaled."""

    @property
    def scale(self) -> float:
        """The factor on the loss at this step; 1 without a scaler."""
        return 1.0 if self._scaler is None else self._scaler.get_scale()

    def unscale(self, optimizer: Optimizer) -> bool:
        """Divide the gradients by the scale, unless Lightning has done it already.

        Lightning leaves it to the kernel of a fused optimizer.

        Returns:
            False if the gradients cannot be unscaled: the window's last micro-batch had no backward pass.
        """
        if self._scaler is None or trainer_internals.scaler_has_unscaled(self._scaler, optimizer):
            return True
        if not trainer_internals.supports_device_decisions(optimizer):
            return False
        self._scaler.unscale_(optimizer)
        return True

    def found_nonfinite(self, optimizer: Optimizer) -> bool:
        """Whether the scaler found a non-finite gradient in this step, so that it will not call ``optimizer.step``.

        Reads from the device. False without a scaler.
        """
        return self._scaler is not None and trainer_internals.scaler_found_overflow(self._scaler, optimizer)

    def mark_nonfinite(self, optimizer: Optimizer) -> None:
        """Another rank has a non-finite gradient in this step: the scaler is to act here as it does there."""
        if self._scaler is not None:
            trainer_internals.mark_scaler_overflow(self._scaler, optimizer)

    def freeze(self) -> None:
        """Store scale and growth count, because the step is dropped for its content; `put_back` restores them."""
        if self._scaler is not None:
            self._frozen = self._scaler.state_dict()

    def put_back(self) -> None:
        """Restore scale and growth count after the scaler's update, if the step was dropped for its content."""
        if self._frozen is not None and self._scaler is not None:
            self._scaler.load_state_dict(self._frozen)
            self._frozen = None

    def metrics(self, counters: Counters) -> dict[str, float]:
        """``loss_scale`` with a scaler; ``overflows``: steps that it dropped since the start of the run, if any."""
        found = {"loss_scale": self.scale} if self.is_active else {}
        return found | ({"overflows": float(counters.overflows)} if counters.overflows else {})
