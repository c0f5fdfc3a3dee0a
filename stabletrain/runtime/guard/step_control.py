"""Making a dropped step a batch never seen, bit for bit.

Parameters and optimizer state: ``optimizer.step`` of this one optimizer is wrapped; a dropped step runs forward and
backward (the closure) and not the update. On the device, the fused kernel itself does nothing where ``found_inf`` is
set. Buffers that forward changed (BatchNorm statistics) are restored to their values before the accumulation window.
The module's own per-step scheduler and the global step do not move; nor does the loss scaler (see `LossScaling`).
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.runtime.guard.module_buffers import ModuleBuffers
from stabletrain.runtime.internals import trainer as trainer_internals


class StepControl:
    """Undoes what a dropped step has changed, and stops what it would change, for one fit.

    Args:
        trainer: in a fit, with its optimizer set up.
        module: the module that is trained.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer = trainer
        self.optimizer: Optimizer = trainer.optimizers[0]
        self._module = module
        self._buffers = ModuleBuffers(module)
        self._drop = False
        self._frozen = False
        self._replaced: list[tuple[object, str, Any]] = []
        self._wrap_optimizer_step()
        self._wrap_scheduler_step()

    @property
    def has_buffers(self) -> bool:
        """Whether `start_window` has anything to do: the module has buffers."""
        return len(self._buffers) > 0

    def start_window(self) -> None:
        """An accumulation window starts: a dropped step puts the buffers back to what they are now."""
        self._buffers.stash()

    def start_decision(self) -> None:
        """A decision is about to be made: the step is neither dropped nor frozen yet."""
        # after an overflow the loss scaler does not call optimizer.step, so that a drop would be left over
        self._drop = self._frozen = False

    def drop(self) -> None:
        """Decided on the host: do not apply the step in progress."""
        self._drop = True
        self.freeze_step()
        self._buffers.restore()

    def freeze_step(self) -> None:
        """The step in progress is not applied: global step and the module's own per-step scheduler do not move."""
        self._frozen = True
        trainer_internals.undo_global_step(self.trainer)

    def decide_on_device(self, grad_scale: Tensor, dropped: Tensor) -> None:
        """Let the fused kernel divide the gradient by ``grad_scale``, or do nothing where ``dropped`` is 1."""
        self.optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = dropped  # type: ignore[attr-defined]
        self._buffers.restore_where(dropped)

    def undo(self) -> None:
        """Restore the methods of optimizer and module that were replaced for the fit."""
        for owner, name, before in self._replaced:
            if before is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before
        self._replaced.clear()
        self.optimizer.__dict__.pop("grad_scale", None)
        self.optimizer.__dict__.pop("found_inf", None)

    def _replace(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        # torch's schedulers leave a method of their own on the optimizer: undo must put that one back
        self._replaced.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = method

    def _wrap_optimizer_step(self) -> None:
        inner = self.optimizer.step

        @functools.wraps(inner)  # keeps the mark that torch's schedulers look for
        def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            result = None
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            if self._drop:
                self._drop = False
            else:
                applied = inner(**kwargs)
                result = result if closure is not None else applied
            if closure is not None:
                # the loss scaler passes no closure, and deletes these attributes itself
                optimizer.__dict__.pop("grad_scale", None)
                optimizer.__dict__.pop("found_inf", None)
            return result

        # a bound method: torch's schedulers read `__func__` of it
        self._replace(self.optimizer, "step", types.MethodType(step, self.optimizer))

    def _wrap_scheduler_step(self) -> None:
        if not self.trainer.lr_scheduler_configs:
            return
        inner = self._module.lr_scheduler_step

        @functools.wraps(inner)
        def lr_scheduler_step(scheduler: Any, metric: Any) -> None:
            if not (self._frozen and trainer_internals.scheduler_interval(self.trainer, scheduler) == "step"):
                inner(scheduler, metric)

        self._replace(self._module, "lr_scheduler_step", lr_scheduler_step)
