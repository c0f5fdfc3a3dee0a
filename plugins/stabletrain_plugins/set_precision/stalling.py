"""Which optimizers lose small updates of bf16 parameters, by what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime.internals.state import state_holders
from stabletrain.settings import worded


def refuse_stalling(
    optimizers: list[Optimizer], module: nn.Module, in_bf16: Callable[[Tensor], bool] | None = None
) -> None:
    """Raise an error if an optimizer rounds its updates of bf16 parameters to nearest.

    A bf16 number has 8 bits: from a weight of 1, an update below 1/512 is lost, at every step.

    Args:
        optimizers: of a fit.
        module: that is trained.
        in_bf16: whether a trained parameter is in bfloat16; None: by its dtype.

    Raises:
        UserError: with the choice.
    """
    found = (each for optimizer in optimizers for each in _stalling(optimizer, module, in_bf16 or _has_bf16))
    names = sorted({type(each).__name__ for each in found})
    if names:
        raise UserError(
            worded(
                f"precision bf16_true with {', '.join(names)}: parameters are bfloat16, and this optimizer rounds each "
                "update to nearest, so that updates below 1/512 of a weight are lost and training stops moving while "
                "nothing fails. Use an optimizer that keeps what rounding loses: optimizer=adamw_kahan, "
                "stable_adamw_kahan or lion_kahan (torch-optimi, 2 more bytes per parameter), or one of torchao with "
                "bf16_stochastic_round=True (no more memory); or precision=bf16_mixed. To train like this all the "
                "same: config key precision.allow_stalling=true"
            )
        )


def _has_bf16(parameter: Tensor) -> bool:
    return parameter.dtype == torch.bfloat16


def _stalling(optimizer: Optimizer, module: nn.Module, in_bf16: Callable[[Tensor], bool]) -> Iterator[Optimizer]:
    """The optimizer, or those that it is made of, as far as they stall."""
    holders = state_holders(optimizer, module)
    if len(holders) > 1 and _package(optimizer) in ("torch", "stabletrain", "stabletrain_plugins"):
        holders = holders[1:]  # those inside make the updates
    for each in holders:
        groups = [group for group in each.param_groups if any(p.requires_grad and in_bf16(p) for p in group["params"])]
        if groups and not (_rounds_stochastically(each) or all(_sums_rounding_errors(each, group) for group in groups)):
            yield each


def _rounds_stochastically(optimizer: Optimizer) -> bool:
    """torchao's low-bit optimizers, and its ``_AdamW``."""
    return _package(optimizer) == "torchao" and bool(getattr(optimizer, "bf16_stochastic_round", False))


def _sums_rounding_errors(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Kahan summation: torch-optimi's, on by itself for bf16 (None), and pytorch-optimizer's."""
    package, kahan = _package(optimizer), group.get("kahan_sum", False)
    return (package == "optimi" and kahan is not False) or (package == "pytorch_optimizer" and kahan is True)


def _package(optimizer: Optimizer) -> str:
    """Of the class or a base class: an optimizer of the user may derive from one of theirs."""
    packages = [each.__module__.partition(".")[0] for each in type(optimizer).__mro__]
    return next((name for name in packages if name in ("torchao", "optimi", "pytorch_optimizer")), packages[0])
