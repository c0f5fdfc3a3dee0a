"""Under DistributedDataParallel: a micro-batch for which one rank has no loss, so that its step can be dropped on all.

The other ranks wait in their backward pass until every parameter's gradient has arrived from this rank. So instead of
no loss at all this rank gets one that is zero and reaches every trained parameter; its gradients are zero. The ranks
learn of it with the all-reduce of the loss, and drop the step. If no rank has a loss there is nothing to drop, and the
run goes on as on one process, where nothing is replaced. Under strategies that shard the model
a rank takes part in the forward pass of the others too, and Lightning raises an error.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel

from stabletrain.runtime.internals import trainer as trainer_internals

Missing: TypeAlias = Literal["drop", "ignore"]
"""What follows from a missing loss: the window is dropped, or the micro-batch has no part in the window's loss."""


class NoBatch:
    """Stands for a batch that is None, on a rank that takes part in the step of the others."""


class MissingLosses:
    """Replaces missing losses for one fit under DistributedDataParallel; under other strategies it does nothing.

    A loss is missing if ``training_step`` returns None, or a loss whose graph has no parameter, such as
    ``torch.zeros((), requires_grad=True)``, where the other ranks wait for gradients that its backward pass does not
    reach. And it is if the loader gives None for a batch, which Lightning passes over; hooks then get a `NoBatch`.

    Args:
        trainer: in a fit; its strategy has set up the model.
        module: the module that is trained.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self._module = module
        self._device = trainer.strategy.root_device
        self._missing: Missing | None = None
        self._without_output = False
        self._undo: list[Callable[[], None]] = []
        self._model = trainer.strategy.model
        several = trainer.world_size > 1 and isinstance(self._model, DistributedDataParallel)
        if several and module.automatic_optimization:
            self._replace(module, "training_step", self._training_step(module.training_step))
            self._replace(trainer.strategy, "batch_to_device", _keep_none(trainer, trainer.strategy.batch_to_device))
            self._undo.append(trainer_internals.hide_output(trainer, self._take_without_output))

    def take(self) -> Missing | None:
        """What follows from the missing loss of this micro-batch, None if it has one; the next call is for the next."""
        missing, self._missing = self._missing, None
        return missing

    def undo(self) -> None:
        """Restore what was replaced."""
        while self._undo:
            self._undo.pop()()

    def _take_without_output(self) -> bool:
        without, self._without_output = self._without_output, False
        return without

    def _replace(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        attributes = vars(owner)
        before = attributes.get(name)
        attributes[name] = method

        def undo() -> None:
            if before is None:
                attributes.pop(name, None)
            else:
                attributes[name] = before

        self._undo.append(undo)

    def _training_step(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._missing, self._without_output = None, False
            batch = next(iter((*args, *kwargs.values())), None)
            return self._with_loss(None if isinstance(batch, NoBatch) else inner(*args, **kwargs))

        # Lightning reads the names of the arguments behind one decorator, and the module's own may be one
        training_step.__wrapped__ = getattr(inner, "__wrapped__", inner)
        return training_step

    def _with_loss(self, output: Any) -> Any:
        """The output of ``training_step``, with a loss that reaches all parameters if its own is missing."""
        if output is None:
            self._missing, self._without_output = "drop", True
            return self._zero()
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor) or not loss.requires_grad or _may_reach_parameters(loss):
            return output
        if not getattr(self._model, "require_backward_grad_sync", True):
            self._missing = "ignore"  # within an accumulation window no rank waits: Lightning goes on
            return output
        self._missing = "drop"
        loss = loss + self._zero().to(loss.dtype)
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _zero(self) -> Tensor:
        trained = [p for p in self._module.parameters() if p.requires_grad]
        embeddings = [m for m in self._module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
        sparse = {id(m.weight) for m in embeddings if m.sparse}  # as DistributedDataParallel finds them
        zero: Tensor = _Zero.apply(self._device, [id(p) in sparse for p in trained], *trained)  # type: ignore[no-untyped-call]
        return zero


class _Zero(torch.autograd.Function):
    """0, with a gradient of zeros for each parameter, also for one that is NaN."""

    @staticmethod
    def forward(ctx: Any, device: torch.device, sparse: list[bool], *parameters: Tensor) -> Tensor:
        ctx.sparse, ctx.parameters = sparse, parameters
        return torch.zeros((), device=device)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.sparse, ctx.parameters, strict=True)
        return (None, None, *(_no_rows(p) if sparse else torch.zeros_like(p) for sparse, p in pairs))


def _keep_none(trainer: Trainer, inner: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inner)
    def batch_to_device(*args: Any, **kwargs: Any) -> Any:
        batch = inner(*args, **kwargs)
        return NoBatch() if batch is None and trainer.training else batch

    return batch_to_device


def _no_rows(weight: Tensor) -> Tensor:
    """A sparse gradient of an embedding without entries."""
    indices = torch.zeros((1, 0), dtype=torch.long, device=weight.device)
    values = weight.new_zeros((0, *weight.shape[1:]))
    return torch.sparse_coo_tensor(indices, values, weight.shape, check_invariants=True)


def _may_reach_parameters(loss: Tensor) -> bool:
    """Whether the backward pass of a loss may change the gradient of a parameter.

    True, too, where the graph does not say: functions written in Python, such as activation checkpointing, may run a
    backward pass of their own.
    """
    if isinstance(loss, nn.Parameter):
        return True
    waiting, seen = deque([loss.grad_fn]), {loss.grad_fn}
    while waiting:  # breadth first: the parameters of the last layer are a few nodes away
        node = waiting.popleft()
        if node is None:
            continue
        if isinstance(node, BackwardCFunction):
            return True
        if not (functions := node.next_functions) and isinstance(getattr(node, "variable", None), nn.Parameter):
            return True
        new = [each for each, _ in functions if each not in seen]
        seen.update(new)
        waiting.extend(new)
    return False
