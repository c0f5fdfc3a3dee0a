"""Checks in the first steps of a fit that the optimizer steps when ``step`` is called: not before it, and not never.

An optimizer that steps during backward (gradient release, LOMO, torch's ``_apply_optimizer_in_backward``) has made its
step before a plugin can drop or clip it. One that computes the loss within ``step``, in a closure, does nothing
if it is called after the loss was computed. Both would go unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime.internals.attributes import has_hooks, version_of
from stabletrain.runtime.internals.optimizer_attributes import Fingerprint
from stabletrain.runtime.ranks import Ranks

_SAMPLED = 512
"""Elements of each parameter that are compared."""
_WINDOWS = 10
"""Windows, and steps, after which a check that could not be decided ends."""
_PASSES = 100
"""Backward passes after which the first ends, if not all optimizers have made a step: with manual optimization, some
are never used."""


class _Seen(NamedTuple):
    name: str
    parameter: Tensor
    version: int
    address: int
    sample: Tensor | None


class BackwardWatch:
    """Compares the trained parameters before and after backward.

    It sees changes of the version counters, and changes of the values that do not count as such (of ``p.data``). While
    FSDP2 has a layer's parameters gathered, they are others than the sharded ones of the optimizer: both are compared.

    Args:
        module: that is trained.
        optimizers: of the run.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._module, self._optimizers = module, list(optimizers)
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._before: list[_Seen] = []
        self._doubtful = False
        self._windows = self._passes = 0
        self.is_over = False
        """Whether the check is complete."""

    def before_backward(self) -> None:
        """A backward pass begins."""
        self._passes += 1
        self.is_over |= self._passes > _PASSES
        if not self.is_over:
            self._before = [
                _Seen(name, p, version_of(p), _address(p), _sample(p))
                for name, p in self._parameters()
                if p.requires_grad
            ]

    def _parameters(self) -> Iterator[tuple[str, Tensor]]:
        seen = set()
        for name, p in self._module.named_parameters():
            seen.add(id(p))
            yield name, p
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if id(p) not in seen:
                        seen.add(id(p))
                        yield self._names.get(id(p), "of the optimizer"), p

    def after_backward(self) -> None:
        """A backward pass has ended.

        Raises:
            UserError: if a parameter has changed.
        """
        for name, p, version, address, sample in self._before:
            if _address(p) != address:
                continue  # a strategy has exchanged its memory
            counted = version_of(p) != version
            if (sample is not None and not _same(sample, _sample(p))) or (counted and has_hooks(p)):
                raise UserError(_steps_in_backward(name, self._optimizers))
            self._doubtful |= (
                counted  # it has the same values: a learning rate of 0, or an embedding that is normalised
            )
        self._before = []

    def end_window(self) -> None:
        """All optimizers have made a step: the check is over, unless it could not be decided."""
        self._windows += 1
        self.is_over = not self._doubtful or self._windows >= _WINDOWS
        self._doubtful = False


class StepEffect:
    """Checks that the first step of an optimizer changes something, on any rank: a rank may have no part of anything.

    It reads from the device only if neither a version counter nor plain state of the optimizer has changed. Several
    ranks decide together, in one collective at each step that is checked.

    Args:
        optimizer: the optimizer.
        module: that it trains.
        ranks: of the fit.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module, ranks: Ranks) -> None:
        self._optimizer, self._module, self._ranks = optimizer, module, ranks
        self._steps = 0
        self.is_over = False
        """Whether the check is complete."""

    def check(self, step: Callable[[], Any]) -> Any:
        """Make a step.

        Args:
            step: makes it.

        Raises:
            UserError: if it has changed nothing, although there were gradients that would have changed a parameter.
        """
        self._steps += 1
        before = Fingerprint(self._optimizer, self._module)
        pairs = [(group, p) for group in self._optimizer.param_groups for p in group["params"]]
        samples = [_sample(p) for _, p in pairs]
        result = step()
        moved = before.has_changed() or any(
            sample is not None and not _same(sample, _sample(p)) for sample, (_, p) in zip(samples, pairs, strict=True)
        )
        should_move = not moved and any(_would_change(group, p) for group, p in pairs)
        moved, should_move = (number > 0 for number in self._ranks.sum(float(moved), float(should_move)))
        self.is_over = moved or self._steps >= _WINDOWS
        if should_move and not moved:
            raise UserError(
                f"{type(self._optimizer).__name__}.step() has changed neither parameters nor its own state, although "
                "there were gradients and the learning rate is not 0. stabletrain calls it without a closure, when the "
                "loss has been computed: an optimizer that computes the loss within its step, or steps elsewhere, is "
                "not supported. Use another optimizer, or remove the plugins."
            )
        return result


def _would_change(group: dict[str, Any], p: Tensor) -> bool:
    """Whether a plain gradient step at the group's learning rate would change a parameter."""
    value, gradient = _sample(p), None if p.grad is None else _sample(p.grad)
    if value is None or gradient is None or value.shape != gradient.shape:
        return False
    changed = (value - float(group.get("lr", 0.0)) * gradient.to(value.dtype)) != value
    return bool((changed & gradient.isfinite()).any())


def _steps_in_backward(name: str, optimizers: list[Optimizer]) -> str:
    kinds = ", ".join(dict.fromkeys(type(each).__name__ for each in optimizers))
    return (
        f"stabletrain plugins cannot guard {kinds}: the parameter {name} was changed during backward, before a plugin "
        "can drop or clip the step. Expected an optimizer that steps when step() is called; this one, or a hook on the "
        "parameters, steps as gradients arrive (gradient release, LOMO, optimizer in backward). Switch that off (in "
        "torch-optimi gradient_release=False), or remove the plugins."
    )


def _local(tensor: Tensor) -> Tensor | None:
    """The plain tensor of this process; None for a tensor that wraps others."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    return None if hasattr(tensor, "__tensor_flatten__") or tensor.layout is not torch.strided else tensor.detach()


def _address(p: Tensor) -> int:
    local = _local(p)
    return 0 if local is None else local.data_ptr()


def _sample(tensor: Tensor) -> Tensor | None:
    """Some elements, spread over a tensor."""
    local = _local(tensor)
    if local is None or local.is_meta:
        return None
    flat = local.reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLED)].clone()


def _same(one: Tensor, other: Tensor | None) -> bool:
    """Equal to the last bit; NaN too."""
    if other is None or one.shape != other.shape:
        return False
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))
