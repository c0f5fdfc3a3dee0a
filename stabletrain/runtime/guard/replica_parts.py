"""What a rank holds of parameters and optimizer state of which other ranks have copies."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.ranks import Ranks


class Part(NamedTuple):
    """What a rank holds of a parameter, or of an optimizer's state of it.

    Args:
        name: of the parameter.
        place: which part of the whole it is, ``""`` for all of it on every rank of the run; ranks with the same name
            and place have copies of each other.
        trained: whether the parameter requires a gradient.
        state: for a tensor of optimizer state its key, such as ``exp_avg``; empty for the parameter itself.
    """

    name: str
    place: str
    trained: bool
    state: str = ""

    def __str__(self) -> str:
        return f"{self.state} of {self.name}" if self.state else self.name


def parameter_parts(ranks: Ranks, module: nn.Module) -> Iterator[tuple[Part, Tensor]]:
    """The parts that this rank holds of the parameters whose copies must be equal, with their values.

    Left out are plain parameters that nothing keeps equal (`Ranks.placement`), and shards without a copy.

    Args:
        ranks: of the fit.
        module: that is trained, with its weights loaded.
    """
    for name, p in module.named_parameters():
        place = _place(ranks, p)
        if place is not None:
            for suffix, plain in _plain_tensors(p):
                yield Part(name + suffix, place, p.requires_grad), plain


def state_parts(ranks: Ranks, module: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[tuple[Part, Tensor]]:
    """The parts that this rank holds of the optimizers' state whose copies must be equal, with their values.

    A tensor of state is where its parameter is, unless it is a DTensor, which has a place of its own. Left out is the
    state of an optimizer that divides it among the ranks (ZeroRedundancyOptimizer): nobody else has it.

    Args:
        ranks: of the fit.
        module: that is trained.
        optimizers: of the module.
    """
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters()}
    several = 0
    for optimizer in optimizers:
        if state_internals.divides_state(optimizer):
            continue
        for holder in state_internals.state_holders(optimizer, module):
            state = vars(holder).get("state", {})
            number = f" (optimizer {several})" if several and state else ""
            several += bool(state)
            for p in [p for group in holder.param_groups for p in group["params"] if p in names and p in state]:
                place = _place(ranks, p)
                for key, each in _tensors(state[p]):
                    of_state = _place(ranks, each) if isinstance(each, DTensor) else place
                    if of_state is not None:
                        for suffix, plain in _plain_tensors(each):
                            yield Part(names[p], of_state, p.requires_grad, key + suffix + number), plain


def may_have_copies(p: Tensor) -> bool:
    """Whether another rank may hold the same as this one; of a plain tensor only its strategy knows whether it does.

    Args:
        p: a parameter, on one of several ranks.
    """
    if not isinstance(p, DTensor):
        return True
    cut = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    return any(p.device_mesh.size(i) > 1 for i in range(p.device_mesh.ndim) if i not in cut)


def _place(ranks: Ranks, p: Tensor) -> str | None:
    """Which part of a parameter this rank holds; None if no other rank has to have the same.

    For a DTensor it consists of the ranks of its mesh, and the coordinates where the mesh cuts the tensor.
    """
    if p.is_meta or isinstance(p, nn.parameter.UninitializedParameter):
        return None
    if not isinstance(p, DTensor):
        return "" if ranks.placement(p) == "replicated" else None
    if not may_have_copies(p):
        return None
    mesh, coordinates = p.device_mesh, p.device_mesh.get_coordinate() or ()
    cut = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not cut and mesh.size() == ranks.size:
        return ""
    return f"{zlib.crc32(repr(mesh.mesh.tolist()).encode())}:{[(i, coordinates[i]) for i in cut if coordinates]}"


def _tensors(value: Any, key: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in a parameter's state, each with its key; of containers in it, too."""
    if isinstance(value, Tensor):
        yield key, value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, each in items:
            yield from _tensors(each, f"{key}.{name}" if key else str(name))


def _plain_tensors(tensor: Tensor, suffix: str = "") -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the plain ones in a tensor that wraps others (shards, quantised weights)."""
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, attribute), f"{suffix}.{attribute}")
    else:
        yield suffix, tensor
