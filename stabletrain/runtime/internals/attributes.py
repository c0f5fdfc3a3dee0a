"""Which attributes of a module may be state of its own: not those of torch, Lightning and torchmetrics."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

_LIGHTNING = ("lightning.pytorch.core", "pytorch_lightning.core")


def attribute_owners(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules by name, without metrics, which have states of their own."""
    metrics: list[str] = []
    for name, child in module.named_modules():
        if isinstance(child, Metric | MetricCollection):
            metrics.append(f"{name}.")
        elif not name.startswith(tuple(metrics)):
            yield name, child


def is_of_library(module: nn.Module) -> bool:
    """Whether the class of a module is torch's: its forward sets no attributes, but code elsewhere may add some."""
    bases = (base.__module__.partition(".")[0] for base in type(module).__mro__)  # FSDP2 derives a class of its own
    return all(package in ("torch", "abc", "builtins", "typing") for package in bases)


def ignored_attributes(module: nn.Module) -> frozenset[str]:
    """Attributes of a module that the libraries set; weights that torch computes from parameters at each forward too.

    These are attributes named as ``weight`` beside parameters ``weight_orig`` (pruning, spectral norm), or ``weight_g``
    and ``weight_v`` (weight norm).
    """
    lightnings = any(base.__module__.startswith(_LIGHTNING) for base in type(module).__mro__)
    ignored = _of_lightning_module() if lightnings else _of_module()
    if isinstance(module, nn.RNNBase):
        ignored |= {"_flat_weights", "_flat_weight_refs"}
    computed = {name.removesuffix("_orig") for name in names_within(module._parameters) if name.endswith("_orig")}
    directions = {name.removesuffix("_v") for name in names_within(module._parameters) if name.endswith("_v")}
    computed |= {name for name in directions if f"{name}_g" in module._parameters}
    return ignored | computed if computed else ignored


def buffers_not_saved(module: nn.Module) -> frozenset[str]:
    """The names of a module's buffers that its ``state_dict`` leaves out."""
    return frozenset(module._non_persistent_buffers_set)


def names_within(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """The names in ``_parameters`` or ``_buffers`` of a module; those of a scripted one cannot be iterated."""
    return list(tensors.keys())


def version_of(tensor: Tensor) -> int:
    """The number of in-place changes of a tensor; -1 for one that has no count (inference mode)."""
    return -1 if tensor.is_inference() else tensor._version


def has_hooks(parameter: Tensor) -> bool:
    """Whether a hook is called with a parameter's gradient, or after it was accumulated."""
    tensor: Any = parameter
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


@functools.cache
def _of_module() -> frozenset[str]:
    return frozenset(vars(nn.Module()))


@functools.cache
def _of_lightning_module() -> frozenset[str]:
    from lightning.pytorch import LightningModule

    from stabletrain.runtime.internals.packages import both

    hyper_parameters = {"_hparams", "_hparams_initial", "_hparams_name", "_log_hyperparams"}
    return frozenset({*vars(both(LightningModule)[0]()), *hyper_parameters})


def names_of(owner: Any) -> dict[str, Any]:
    """The dictionary of an object's attributes itself; empty for an object without one."""
    found: dict[str, Any] = getattr(owner, "__dict__", {})
    return found
