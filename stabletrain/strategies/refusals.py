"""Modules and Trainers that FSDP2 cannot train, refused before the first step with the reason and what to do."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from stabletrain.errors import UserError
from stabletrain.runtime.internals.fake_world import is_plain
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.internals.shards import class_name
from stabletrain.strategies.messages import worded

_NO_ATTRIBUTES = ("_parameters", "_modules", "_buffers")
_DEPTH = 4


def check_callbacks(callbacks: Iterable[Callback]) -> None:
    """Refuse callbacks that copy the module, which FSDP2 forbids.

    Raises:
        UserError: for `WeightAveraging`, `EMAWeightAveraging` and `StochasticWeightAveraging`.
    """
    for each in callbacks:
        if isinstance(each, (*both(WeightAveraging), *both(StochasticWeightAveraging))):
            raise UserError(
                worded(
                    f"fsdp2: {type(each).__name__} copies the whole module (deepcopy), which FSDP2 forbids. Remove it "
                    "(config key plugins/averaging=none), use an optimizer that averages itself "
                    "(optimizer=adamw_schedulefree), or strategy=ddp"
                )
            )


def check_compiler(device: torch.device, backend: bool | str) -> None:
    """Refuse torch's default compiler on a machine that has no compiler for C++; it would fail in the first step.

    Args:
        device: of the training.
        backend: the argument ``compile_units``.

    Raises:
        UserError: if there is none.
    """
    if device.type != "cpu" or backend not in (True, "inductor"):
        return
    names = [os.environ.get("CXX") or "g++", "clang++"]
    if not any(shutil.which(each) for each in names):
        raise UserError(
            worded(
                f"fsdp2: compile_units={backend!r} needs a compiler for C++ on a CPU, and {' and '.join(names)} are "
                "not found. Install one, name it in the environment variable CXX, or do not compile (config key "
                "strategy.compile_units=false)"
            )
        )


def check_parameters(root: nn.Module) -> None:
    """Refuse parameters that FSDP2 cannot shard, or that are sharded already.

    Raises:
        UserError: names the parameter.
    """
    sharded = [name for name, p in root.named_parameters() if isinstance(p, DTensor)]
    if sharded:
        raise UserError(
            f"fsdp2: {class_name(root)} shards itself: {sharded[0]} is a DTensor already. Remove fully_shard from its "
            "configure_model, or use Lightning's ModelParallelStrategy instead of strategy=fsdp2"
        )
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise UserError(
                f"fsdp2: {name} has no shape yet, as it belongs to a lazy module. Run one batch through the module "
                "before the fit, or give the layer its sizes"
            )
    for name, p in root.named_parameters():
        if p.is_quantized or not (is_plain(p) or (type(p) is nn.Parameter and is_plain(p.data))):
            kind = type(p.data) if type(p) is nn.Parameter else type(p)
            what = "quantised" if p.is_quantized else f"a {kind.__name__}"
            raise UserError(
                f"fsdp2: {name} is {what}; expected an ordinary nn.Parameter, since sharding would make it one and "
                "lose what its class adds. Use strategy=ddp"
            )
        if p.is_complex():
            raise UserError(
                f"fsdp2: {name} is complex ({p.dtype}), which FSDP2 does not reduce. Keep real and imaginary part in "
                "two parameters, or use strategy=ddp"
            )


def check_dtypes(group: str, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse trained parameters of several dtypes that are gathered together.

    Args:
        group: name of the unit; empty: the rest of the module.
        parameters: of the group, by name.

    Raises:
        UserError: names one parameter of each dtype.
    """
    first: dict[torch.dtype, str] = {}
    for name, p in parameters.items():
        if p.requires_grad:
            first.setdefault(p.dtype, name)
    if len(first) > 1:
        found = ", ".join(f"{name} ({dtype})" for dtype, name in first.items())
        raise UserError(
            worded(
                f"fsdp2: {f'the unit {group}' if group else 'the group of the root'} has trained parameters of several "
                f"dtypes: {found}. Bring them to one dtype, or choose units of one dtype each (config key "
                "strategy.units)"
            )
        )


def check_references(root: nn.Module, sharded: Iterable[Tensor]) -> None:
    """Refuse parameters that an attribute or a list keeps besides their registered place.

    Sharding replaces the registered parameter; the other reference would stay what it was, and never be trained.

    Args:
        root: the LightningModule, before it is sharded.
        sharded: the parameters that will be replaced.

    Raises:
        UserError: names the attribute and the parameter.
    """
    replaced = {id(p) for p in sharded}
    names = {id(p): name for name, p in root.named_parameters()}
    for path, module in root.named_modules():
        for key, value in vars(module).items():
            if key in _NO_ATTRIBUTES or (isinstance(module, nn.RNNBase) and key == "_flat_weights"):
                continue
            for tensor in _tensors(value):
                if id(tensor) in replaced:
                    place = f"{path}.{key}" if path else key
                    raise UserError(
                        f"fsdp2: the attribute {place} of {class_name(root)} keeps the parameter {names[id(tensor)]} "
                        "besides its registered place; after sharding it would be another tensor, which is never "
                        "trained. Look it up where it is registered, or keep its name"
                    )


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        yield from _tensors(list(value.values()), depth - 1)
    elif depth and isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from _tensors(each, depth - 1)


def check_manual(module: LightningModule, optimizers: Sequence[Optimizer]) -> None:
    """Refuse several optimizers: they step and freeze parameters while the root's are whole.

    Args:
        module: that is trained.
        optimizers: of the module.

    Raises:
        UserError: if there are several.
    """
    if not module.automatic_optimization and len(optimizers) > 1:
        raise UserError(
            f"fsdp2: {class_name(module)} steps {len(optimizers)} optimizers by hand. toggle_optimizer reaches the "
            "sharded parameters only, not the whole ones that a step of FSDP2 computes with, so gradients would go "
            "to the wrong optimizer. Use one optimizer, or strategy=ddp"
        )


class ReplacedParameters:
    """The parameters that sharding has replaced, to find an optimizer that was made before.

    Args:
        parameters: by name. They are not kept alive, since they hold the whole weights.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._found = {id(p): (name, weakref.ref(p)) for name, p in parameters.items()}

    def check(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse an optimizer that would train parameters which the module does not have any longer.

        Raises:
            UserError: names one of them.
        """
        for optimizer in optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                name, reference = self._found.get(id(p), ("", None))
                if reference is not None and reference() is p:
                    raise UserError(
                        f"fsdp2: {type(optimizer).__name__} was made before the module was sharded: its {name} is not "
                        "the module's any longer. Make the optimizer in configure_optimizers, not in __init__"
                    )
