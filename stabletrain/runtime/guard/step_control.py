"""Making a dropped step a batch never seen, bit for bit.

Parameters and optimizer state: ``optimizer.step`` of this one optimizer is wrapped; a dropped step runs forward and
backward (the closure) and not the update. On the device, the fused kernel itself does nothing where ``found_inf`` is
set. Buffers that forward changed (BatchNorm statistics) go back to where they were before the accumulation window.
The module's own per-step scheduler, the global step and the loss scaler stay where they are.
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
    """Owns what must be undone or held when a step is dropped, for one fit.

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
        self._held = False
        self._scaler_state: dict[str, Any] | None = None
        self._replaced: list[tuple[object, str, Any]] = []
        self._wrap_optimizer_step()
        self._wrap_scheduler_step()

    @property
    def watches_windows(self) -> bool:
        """Whether `open_window` has anything to do: the module has buffers."""
        return len(self._buffers) > 0

    def open_window(self) -> None:
        """An accumulation window begins: what the buffers hold now is what a dropped window goes back to."""
        self._buffers.keep()

    def begin(self) -> None:
        """A decision is about to be made: nothing is dropped or held yet."""
        self._drop = self._held = False  # after an overflow the loss scaler does not call step: a drop is left over

    def drop(self, scaler: torch.amp.GradScaler | None = None) -> None:
        """Decided on the host: do not apply the step in progress, and leave the loss scale alone."""
        self._drop = True
        self.hold()
        self._buffers.restore()
        if scaler is not None:
            self._scaler_state = scaler.state_dict()

    def hold(self) -> None:
        """The step in progress is not applied: global step and the module's own scheduler stay."""
        self._held = True
        trainer_internals.undo_global_step(self.trainer)

    def decide_on_device(self, grad_scale: Tensor, dropped: Tensor) -> None:
        """Let the fused kernel divide the gradient by ``grad_scale``, or do nothing where ``dropped`` is 1."""
        self.optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = dropped  # type: ignore[attr-defined]
        self._buffers.choose(dropped)

    def finish_scaler(self, scaler: torch.amp.GradScaler) -> None:
        """After the scaler's update: put back the scale and growth count that a dropped step must not move."""
        if self._scaler_state is not None:
            scaler.load_state_dict(self._scaler_state)
            self._scaler_state = None

    def undo(self) -> None:
        """Leave optimizer and module as they were before the fit."""
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
            if not (self._held and trainer_internals.scheduler_interval(self.trainer, scheduler) == "step"):
                inner(scheduler, metric)

        self._replace(self._module, "lr_scheduler_step", lr_scheduler_step)
