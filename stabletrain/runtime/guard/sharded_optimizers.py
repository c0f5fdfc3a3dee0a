"""Optimizers that fail on sharded parameters (DTensor: FSDP2, tensor parallel), with what works instead."""

from __future__ import annotations

from collections.abc import Iterable

from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabletrain.errors import UserError

_PARTIAL_NORMS = "it works in place with norms that each rank has a part of"
_OWN_SHAPES = "its state has other shapes than the parameter"
_OWN_KERNELS = "its kernels take plain tensors"
_STABLE = "stable_adamw_kahan"
_QUANTIZED = "adamw_8bit_ao"

FAILS = {
    "torch.Adafactor": (_PARTIAL_NORMS, "adamw"),
    "pytorch_optimizer.Lamb": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.StableAdamW": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.AdaGC": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.SPAM": (_PARTIAL_NORMS, _STABLE),
    "pytorch_optimizer.SOAP": (_OWN_SHAPES, "adamw or muon"),
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
        found = _entry(optimizer)
        if found is None or not any(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"]):
            continue
        reason, instead = found
        raise UserError(
            f"{type(optimizer).__name__} cannot train sharded parameters (DTensor: FSDP2, tensor parallel): {reason}. "
            f"Use optimizer={instead} (config key optimizer), or strategy=ddp"
        )


def _entry(optimizer: Optimizer) -> tuple[str, str] | None:
    """The entry for an optimizer's class, or for a base class of it."""
    for kind in type(optimizer).__mro__:
        package = kind.__module__.partition(".")[0]
        if found := FAILS.get(f"{package}.{kind.__name__}") or FAILS.get(package):
            return found
    return None
