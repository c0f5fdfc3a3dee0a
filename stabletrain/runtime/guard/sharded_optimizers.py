"""Optimizers that fail on sharded parameters (DTensor: FSDP2, tensor parallel), with what works instead."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabletrain.errors import UserError

_PARTIAL_NORMS = "it works in place with norms that each rank has a part of"
_OWN_SHAPES = "its state has other shapes than the parameter"
_OWN_KERNELS = "its kernels take plain tensors"
_STABLE = "stable_adamw_kahan"
_QUANTIZED = "adamw_8bit_ao"

_NO_FUSED_KERNEL = (torch.optim.SGD, torch.optim.Adagrad)
"""Classes of torch whose fused kernel takes no sharded tensors; those of Adam and AdamW do."""

FAILS = {
    "torch.Adafactor": (_PARTIAL_NORMS, "adamw"),
    "pytorch_optimizer.Lamb": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.StableAdamW": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.AdaGC": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.SPAM": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.StableSPAM": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.SOAP": (_OWN_SHAPES, "muon"),
    "pytorch_optimizer.Prodigy": (_PARTIAL_NORMS, "adamw"),
    "bitsandbytes": (_OWN_KERNELS, _QUANTIZED),
}
"""Package, or package and class -> why it fails within its step, and an option of ``optimizer`` that works.

Measured with two gloo ranks: docs/optimizers.md has the table.
"""


def check_sharded(optimizers: Iterable[Optimizer]) -> None:
    """Refuse an optimizer that would fail within its first step, because its parameters are sharded.

    Args:
        optimizers: of the module.

    Raises:
        UserError: with the option of ``optimizer`` to use instead.
    """
    for optimizer in optimizers:
        groups = [
            group
            for group in optimizer.param_groups
            if any(isinstance(parameter, DTensor) for parameter in group["params"])
        ]
        if not groups:
            continue
        name, failing = type(optimizer).__name__, "cannot train sharded parameters (DTensor: FSDP2, tensor parallel)"
        if found := _entry(optimizer):
            reason, instead = found
            raise UserError(
                f"{name} {failing}: {reason}. Use optimizer={instead} (config key optimizer), or strategy=ddp"
            )
        if isinstance(optimizer, _NO_FUSED_KERNEL) and any(group.get("fused") for group in groups):
            raise UserError(
                f"{name}(fused=True) {failing}: torch has its fused kernel for plain tensors only. Use fused=False "
                "(config key optimizer.fused), or strategy=ddp"
            )


def _entry(optimizer: Optimizer) -> tuple[str, str] | None:
    """The entry for an optimizer's class, or for a base class of it."""
    for kind in type(optimizer).__mro__:
        package = kind.__module__.partition(".")[0]
        if found := FAILS.get(f"{package}.{kind.__name__}") or FAILS.get(package):
            return found
    return None
