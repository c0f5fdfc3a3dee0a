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
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime import compat


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
        self._buffers = ChangedBuffers(module)
        self._drop = False
        self._held = False
        self._scaler_state: dict[str, Any] | None = None
        self._wrap_optimizer_step()
        self._wrap_scheduler_step()

    def open_window(self) -> None:
        """An accumulation window begins: what the buffers hold now is what a dropped window goes back to."""
        self._held = False
        self._buffers.keep()

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
        compat.hold_global_step(self.trainer)

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
        self.optimizer.__dict__.pop("step", None)
        self._module.__dict__.pop("lr_scheduler_step", None)

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
        self.optimizer.step = types.MethodType(step, self.optimizer)  # type: ignore[method-assign]

    def _wrap_scheduler_step(self) -> None:
        if not self.trainer.lr_scheduler_configs:
            return
        inner = self._module.lr_scheduler_step

        @functools.wraps(inner)
        def lr_scheduler_step(scheduler: Any, metric: Any) -> None:
            if not (self._held and compat.scheduler_interval(self.trainer, scheduler) == "step"):
                inner(scheduler, metric)

        self._module.lr_scheduler_step = lr_scheduler_step  # type: ignore[method-assign]


class ChangedBuffers:
    """Copies of a module's buffers, refreshed only for those that changed.

    A buffer has changed when it is another tensor than before, or when its version counter moved (an in-place change;
    one made through ``.data`` is invisible here).

    Args:
        module: the module whose buffers are watched, non-persistent ones included.
    """

    def __init__(self, module: nn.Module) -> None:
        owners = [
            (child, name) for child in module.modules() for name, buffer in child._buffers.items() if buffer is not None
        ]
        self._owners = owners
        self._tensors = [self._of(owner) for owner in owners]
        self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._versions = [tensor._version for tensor in self._tensors]

    def keep(self) -> None:
        """Take the buffers as they are now."""
        for i in self._changed():
            tensor = self._of(self._owners[i])
            if tensor.shape == self._copies[i].shape:
                self._copies[i].copy_(tensor)
            else:
                self._copies[i] = tensor.detach().clone()
            self._tensors[i], self._versions[i] = tensor, tensor._version

    def restore(self) -> None:
        """Put the changed buffers back, in the tensors they were in."""
        for i in self._changed():
            child, name = self._owners[i]
            tensor = self._tensors[i]
            with torch.no_grad():
                tensor.copy_(self._copies[i])
            child._buffers[name] = tensor
            self._versions[i] = tensor._version

    def choose(self, dropped: Tensor) -> None:
        """As `restore` where ``dropped`` is 1, else as `keep`, decided on the device."""
        for i in self._changed():
            tensor = self._of(self._owners[i])
            with torch.no_grad():
                tensor.copy_(torch.where(dropped.bool(), self._copies[i], tensor))
            self._copies[i].copy_(tensor)
            self._tensors[i], self._versions[i] = tensor, tensor._version

    def _changed(self) -> list[int]:
        return [
            i
            for i, owner in enumerate(self._owners)
            if (tensor := self._of(owner)) is not self._tensors[i] or tensor._version != self._versions[i]
        ]

    @staticmethod
    def _of(owner: tuple[nn.Module, str]) -> Tensor:
        child, name = owner
        tensor = child._buffers[name]
        assert tensor is not None, f"buffer {name} of {type(child).__name__} became None during training"
        return tensor
