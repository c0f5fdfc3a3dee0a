"""Gradients that are not finite, or have the wrong scale."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from stabletrain.chaos.fault import Fault
from stabletrain.errors import UserError


class _GradientFault(Fault, ABC):
    """Changes gradients during backward, so that a fault on one rank reaches all ranks through the reduction."""

    @abstractmethod
    def change(self, grad: Tensor, step: int) -> Tensor:
        """Return the changed gradient; ``grad`` itself is not modified."""

    def targets(self, module: LightningModule) -> list[Parameter]:
        """Return the parameters whose gradients are changed."""
        return [p for p in module.parameters() if p.requires_grad]

    def begin(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Hook the parameters, except sharded ones, whose gradients exist only after backward."""
        self._step = step
        self._sharded = []
        for parameter in self.targets(module):
            if isinstance(parameter, DTensor):
                self._sharded.append(parameter)
            else:
                handle = parameter.register_hook(lambda grad: self.change(grad, step))  # type: ignore[no-untyped-call]
                self.undo_later(handle.remove)
        if self._sharded:
            self.undo_later(self._sharded.clear)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the gradients of sharded parameters of which this rank has a shard."""
        for parameter in getattr(self, "_sharded", ()):
            grad = parameter.grad
            if isinstance(grad, DTensor) and grad.to_local().numel():
                local = grad.to_local()
                local.copy_(self.change(local, self._step))


class BadGradient(_GradientFault):
    """Sets one element of one parameter's gradient to NaN or to another value.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        value: of the element; may be NaN or infinite.
        parameter: name of the parameter; None: the first that is trained.
        steps: number of attempted steps with the fault, >= 1.
        rank: the only rank with the fault; None: all ranks.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.
        seed: for drawing the element, >= 0.

    Raises:
        UserError: if an argument is out of range, or there is no such parameter.
    """

    def __init__(
        self,
        at_step: int,
        value: float = math.nan,
        parameter: str | None = None,
        steps: int = 1,
        rank: int | None = None,
        once: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(at_step, steps, rank, once, seed)
        self.value = value
        self.parameter = parameter

    def targets(self, module: LightningModule) -> list[Parameter]:
        """Return the parameter."""
        return [find_parameter(self, module, self.parameter)]

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log the fault."""
        self.log_fault(trainer, step, f"{self.value:g} in the gradient of {self.parameter or 'the first parameter'}")

    def change(self, grad: Tensor, step: int) -> Tensor:
        """Return a copy with the changed element."""
        bad = grad.clone(memory_format=torch.contiguous_format)
        bad.view(-1)[random.Random(f"{self.seed} {step}").randrange(bad.numel())] = self.value
        return bad


class ScaledGradient(_GradientFault):
    """Multiplies the whole gradient by a factor.

    Args:
        at_step: first attempted optimizer step with the fault, from 0.
        factor: finite.
        steps: number of attempted steps with the fault, >= 1.
        rank: the only rank with the fault; None: all ranks.
        once: apply the fault to each step only once, even if a rollback or a resumed run repeats the step.

    Raises:
        UserError: if an argument is out of range.
    """

    def __init__(
        self, at_step: int, factor: float = 100.0, steps: int = 1, rank: int | None = None, once: bool = True
    ) -> None:
        super().__init__(at_step, steps, rank, once)
        self.factor = factor
        self.require(math.isfinite(factor), "factor", "finite")

    def apply(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        """Log the fault."""
        self.log_fault(trainer, step, f"gradient times {self.factor:g}")

    def change(self, grad: Tensor, step: int) -> Tensor:
        """Return the gradient times the factor."""
        return grad * self.factor


def find_parameter(fault: Fault, module: LightningModule, name: str | None) -> Parameter:
    """Return a trained parameter by name; None: the first one.

    Raises:
        UserError: if there is no such parameter.
    """
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad and p.numel()}
    if not trained or (name is not None and name not in trained):
        raise UserError(
            f"{type(fault).__name__}: there is no trained parameter {name!r}, expected one of "
            f"{', '.join(list(trained)[:8])} ... (config key chaos.parameter)"
        )
    return trained[name] if name is not None else next(iter(trained.values()))
