"""Shards the units of an unmodified LightningModule, and then the rest of it, with torch's FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from stabletrain.errors import UserError
from stabletrain.runtime.hidden.second_forward import SecondForward
from stabletrain.runtime.internals.forward import wrap_forward
from stabletrain.runtime.internals.shards import class_name
from stabletrain.strategies import refusals
from stabletrain.strategies.initial import InitialValues
from stabletrain.strategies.messages import worded
from stabletrain.strategies.units import Choice, Units, choose, is_closed


class Options(NamedTuple):
    """How a module is sharded; see `stabletrain.strategies.fsdp2.FSDP2Strategy`."""

    units: Units
    also: Sequence[str]
    reshard_after_forward: bool
    offload: bool
    checkpoint_units: bool
    compile_units: bool | str
    gather: torch.dtype | None


class Sharded(NamedTuple):
    """A module that is sharded.

    Args:
        choice: its units.
        whole: parameters without a dimension, which are not sharded.
        window_bytes: of the gradients of one rank, while they are accumulated without being reduced.
        replaced: the parameters before sharding.
    """

    choice: Choice
    whole: list[nn.Parameter]
    window_bytes: int
    replaced: refusals.ReplacedParameters


def plan(root: nn.Module, options: Options, kept: Sequence[nn.Module] = ()) -> dict[str, nn.Module]:
    """The modules to shard besides the root, by name, outer ones first; all that can be refused by now is.

    Args:
        root: the LightningModule, complete; its parameters may be on the meta device.
        options: how it will be sharded.
        kept: modules that keep fp32 where the rest is gathered in another dtype; each is sharded by itself.

    Raises:
        UserError: if FSDP2 cannot train the module, or an option does not fit it.
    """
    refusals.check_parameters(root)
    for name in options.also:
        if not callable(getattr(root, name, None)) or name == "forward":
            raise UserError(
                worded(
                    f"fsdp2: {class_name(root)} has no method {name!r}, besides forward (config key strategy.also). "
                    "Expected names of methods that call the module outside of a step, such as generate"
                )
            )
    units = choose(root, options.units).units
    apart = {id(each) for each in kept if is_closed(root, each)}
    scopes = {
        name: each
        for name, each in root.named_modules()
        if name and (name in units or id(each) in apart) and any(p.ndim for p in each.parameters())
    }
    if options.checkpoint_units and options.compile_units:
        for name, unit in units.items():
            if buffers := [key for key, _ in unit.named_buffers()]:
                raise UserError(
                    worded(
                        f"fsdp2: the unit {name} has the buffer {buffers[0]}, which a second forward must not change "
                        "again, and torch.compile cannot put it back. Use one of both (config keys "
                        "strategy.checkpoint_units and strategy.compile_units)"
                    )
                )
    for name, group in groups(root, scopes).items():
        refusals.check_dtypes(name, group)
    refusals.check_references(root, (p for p in root.parameters() if p.ndim))
    return scopes


def groups(root: nn.Module, scopes: dict[str, nn.Module]) -> dict[str, dict[str, nn.Parameter]]:
    """The parameters that are gathered together, by name: for each scope those that are in no scope within it.

    Args:
        root: the LightningModule; its group has the empty name.
        scopes: from `plan`.
    """
    names = {id(p): name for name, p in root.named_parameters()}
    taken: set[int] = set()
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, module in [*reversed(scopes.items()), ("", root)]:
        own = {names[id(p)]: p for p in module.parameters() if p.ndim and id(p) not in taken}
        taken |= {id(p) for p in own.values()}
        found[name] = own
    return found


def shard(
    root: nn.Module, options: Options, mesh: DeviceMesh, device: torch.device, kept: Sequence[nn.Module] = ()
) -> Sharded:
    """Give all ranks the values of rank 0, and shard the module in place. A collective.

    Args:
        root: the LightningModule, the same on all ranks except for its values.
        options: how it is sharded.
        mesh: of one dimension, or of two: replicas and shards.
        device: that of the training.
        kept: modules that keep fp32 where the rest is gathered in another dtype.

    Raises:
        UserError: as `plan`.
    """
    scopes = plan(root, options, kept)
    choice = choose(root, options.units)
    values = InitialValues(root, device, torch.device("cpu") if options.offload else device)
    apart = {id(each) for each in kept}
    replaced: dict[str, nn.Parameter] = {}
    shared: dict[str, Any] = {"mesh": mesh}
    if options.offload:
        shared["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for name, module in [*reversed(scopes.items()), ("", root)]:
        values.complete(module)
        names = {id(p): key for key, p in root.named_parameters()}
        # parameters of units within this one are sharded already
        replaced |= {names[id(p)]: p for p in module.parameters() if p.ndim and not isinstance(p, DTensor)}
        if name in choice.units:
            _prepare(module, options)
        special: dict[str, Any] = {}
        if whole := {p for p in module.parameters() if not p.ndim}:
            special["ignored_params"] = whole
        if name and options.gather is not None and id(module) not in apart:
            special["mp_policy"] = MixedPrecisionPolicy(param_dtype=options.gather, reduce_dtype=torch.float32)
        fully_shard(module, reshard_after_forward=bool(name) and options.reshard_after_forward, **shared, **special)
    for method in options.also:
        register_fsdp_forward_method(root, method)
    return Sharded(
        choice,
        [p for p in root.parameters() if not p.ndim],
        sum(p.numel() * p.element_size() for p in replaced.values() if p.requires_grad),
        refusals.ReplacedParameters(replaced),
    )


def _prepare(unit: nn.Module, options: Options) -> None:
    if options.checkpoint_units:
        _recompute(unit)
    if options.compile_units:
        unit.compile(**({"backend": options.compile_units} if isinstance(options.compile_units, str) else {}))


def _recompute(block: nn.Module) -> None:
    """Compute the activations of a block again in the backward pass, instead of keeping them."""
    has_buffers = any(True for _ in block.buffers())

    def around(block: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return inner(*args, **kwargs)
        # torch.compile does not trace through other contexts
        keeps = has_buffers or not torch.compiler.is_compiling()
        second: dict[str, Any] = {"context_fn": SecondForward(block, (args, kwargs)).contexts} if keeps else {}
        return checkpoint(inner, *args, use_reentrant=False, **second, **kwargs)

    wrap_forward(block, around)
