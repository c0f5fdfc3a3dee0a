"""Restores the state before a dropped step, bit for bit, as if its batches had never been seen.

Parameters and optimizer state: ``optimizer.step`` of this one instance is wrapped; a dropped step runs forward and
backward (the closure) but not the update. In device mode, the fused kernel does nothing if ``found_inf`` is set.
Buffers that forward changed (BatchNorm statistics), and tensors in attributes of modules (the hidden state of an LSTM),
are restored to their values before the accumulation window. The module's own per-step scheduler and the global step do
not advance. For the loss scaler see `LossScaling`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.runtime.guard.module_buffers import ModuleBuffers
from stabletrain.runtime.guard.rewarming import Rewarming
from stabletrain.runtime.guard.step_checks import StepEffect
from stabletrain.runtime.hidden.hidden_state import HiddenState
from stabletrain.runtime.internals import manual as manual_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.records.event_log import logger


class Restorable(Protocol):
    """Buffers that forward may change, such as `ModuleBuffers`."""

    modules: Collection[nn.Module] | None
    """Modules whose hidden state is copied with them; None: all."""

    def stash(self) -> None:
        """Copy them."""

    def restore(self) -> None:
        """Write the copies back."""

    def restore_where(self, dropped: Tensor) -> None:
        """As `restore` where ``dropped`` is 1, else as `stash`, decided on the device."""

    def restore_if_nonfinite(self) -> None:
        """As `restore`, if a NaN or infinity has come into one since it was copied."""


class StepControl:
    """Undoes the changes of dropped steps, and prevents further ones, in one fit.

    Args:
        trainer: in a fit, with its optimizer set up.
        module: the module that is trained.
        rewarming: lowers the learning rate within the optimizer's step.
        ranks: of the fit.
        optimizer: the one that is controlled; None: the module has only one.
        buffers: those that a dropped step restores; None: all of the module.
        hidden: the tensors in the module's attributes, the same for all optimizers; None: found here.
        undecided: called for a step that nothing has decided; None: such a step is made.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        rewarming: Rewarming,
        ranks: Ranks,
        optimizer: Optimizer | None = None,
        buffers: Restorable | None = None,
        hidden: HiddenState | None = None,
        undecided: Callable[[], None] | None = None,
    ) -> None:
        self.trainer = trainer
        self.optimizer: Optimizer = trainer.optimizers[0] if optimizer is None else optimizer
        self._module = module
        self._rewarming = rewarming
        self._buffers: Restorable = ModuleBuffers(module) if buffers is None else buffers
        self.hidden = HiddenState(module) if hidden is None else hidden
        """The tensors in the module's attributes."""
        self._undecided = undecided
        self._drop = False
        self._frozen = False
        self._decided = False
        self._effect = StepEffect(self.optimizer, module, ranks)
        self.after_update: list[Callable[[Optimizer, Tensor | None], None]] = []
        """Called after each update; see `GuardMember.on_update`."""
        self._unwritten: list[dict[str, Any]] = []
        """State of parameters whose momentum was allocated in the last step, and not written if that was dropped."""
        self._replaced: list[tuple[object, str, Any]] = []
        self._wrap_optimizer_step()
        self._wrap_scheduler_step()

    def start_window(self) -> None:
        """Copy buffers and hidden state at the start of an accumulation window; a dropped step restores them."""
        self._buffers.stash()
        self.hidden.stash(self._buffers.modules)
        for message in self.hidden.news():
            if self.trainer.is_global_zero:
                logger.warning(message)

    def start_decision(self) -> None:
        """Reset the marks of the last step, before the next decision."""
        # after an overflow the loss scaler does not call optimizer.step, which would reset the mark of a drop
        self._drop = self._frozen = False
        self._unwritten = []
        self._decided = True

    def drop(self) -> None:
        """Do not apply the step in progress (decided on the host)."""
        self._drop = True
        self.freeze_step()
        self.hidden.restore()  # first: attributes may share memory with buffers whose changes are not counted
        self._buffers.restore()

    def restore_nonfinite_buffers(self) -> None:
        """Restore the buffers if a batch without a loss has made one of them non-finite."""
        self._buffers.restore_if_nonfinite()

    def pass_over(self) -> None:
        """Do not call the optimizer in the step in progress; schedulers and the global step advance."""
        self._drop = True

    def freeze_step(self) -> None:
        """Keep the global step and the module's own per-step scheduler from advancing at the step in progress."""
        self._frozen = True
        self._drop_unwritten()
        trainer_internals.undo_global_step(self.trainer)

    def decide_on_device(self, grad_scale: Tensor, dropped: Tensor) -> None:
        """Make the fused kernel divide the gradient by ``grad_scale``, or do nothing if ``dropped`` is 1."""
        self.optimizer.grad_scale = grad_scale  # type: ignore[attr-defined]
        self.optimizer.found_inf = dropped  # type: ignore[attr-defined]
        self.hidden.restore_where(dropped)
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

    def _drop_unwritten(self) -> None:
        for state in self._unwritten:
            state.pop("momentum_buffer", None)
        self._unwritten = []

    def _replace(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        # torch's schedulers may have set an instance method on the optimizer, which undo must restore
        self._replaced.append((owner, name, owner.__dict__.get(name)))
        owner.__dict__[name] = method

    def _wrap_optimizer_step(self) -> None:
        inner, effect = self.optimizer.step, self._effect

        @functools.wraps(inner)  # keeps the attributes that torch's schedulers check
        def step(optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
            result = None
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            if self._undecided is not None and not self._decided:
                self._undecided()
            self._decided = False
            if self._drop:
                self._drop = False
                manual_internals.count_as_stepped(optimizer)
            else:
                # a fused kernel of torch's may drop the step, and only the device knows
                may_drop = getattr(optimizer, "found_inf", None) is not None
                self._unwritten = _without_momentum(optimizer) if may_drop else []
                with self._rewarming.lowered(optimizer):
                    is_sure = effect.is_over or may_drop
                    applied = inner(**kwargs) if is_sure else effect.check(lambda: inner(**kwargs))
                if self._frozen:  # an overflow: the loss scaler calls the kernel all the same
                    self._drop_unwritten()
                else:
                    for each in self.after_update:
                        each(self.optimizer, getattr(optimizer, "found_inf", None))
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


def _without_momentum(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The state of the parameters for which a fused SGD allocates its momentum in this step.

    It does not initialise that memory. If ``found_inf`` is set, the kernel does not either, and the next step takes
    what is there for the momentum.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return []
    found = []
    for group in optimizer.param_groups:
        parameters = [p for p in group["params"] if p.grad is not None] if group["momentum"] else []
        if parameters and optimizer.state.get(parameters[0], {}).get("momentum_buffer") is None:  # then of all
            found += [optimizer.state[p] for p in parameters]
    return found
