"""What a rank holds between steps, from the sizes of its tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from stabletrain.planning.plan import Group
from stabletrain.runtime.internals.shards import class_name, held_bytes
from stabletrain.runtime.internals.state import state_holders

_CUT = "tensor_parallel"


def optimizer_tensors(optimizers: Sequence[Optimizer], module: nn.Module) -> list[Tensor]:
    """The tensors in the state of optimizers, and of those that they hold.

    Args:
        optimizers: of the run.
        module: whose parameters they update.
    """
    holders = {id(each): each for optimizer in optimizers for each in state_holders(optimizer, module)}
    return [
        tensor
        for holder in holders.values()
        if "state" in vars(holder)
        for state in holder.state.values()
        for tensor in tree_leaves(state)
        if isinstance(tensor, Tensor)
    ]


def groups(module: nn.Module, gather_bytes: int | None = None) -> list[Group]:
    """The groups of parameters that FSDP2 gathers together, those that are alike in a row as one; else one group.

    Args:
        module: as its strategy has made it.
        gather_bytes: bytes per element of a gathered unit; None: those of its dtype.
    """
    sharded = [(name, each) for name, each in module.named_modules() if isinstance(each, FSDPModule)]
    if not sharded:
        return [_group(module, "", list(module.parameters()), None)]
    taken: set[int] = set()
    found: list[Group] = []
    for name, each in reversed(sharded):
        own = [p for p in each.parameters() if id(p) not in taken]
        taken |= {id(p) for p in own}
        if own:
            found.append(_group(each, name, own, gather_bytes if name else None))
    return list(_joined(reversed(found)))


def _group(module: nn.Module, name: str, parameters: list[Any], gather_bytes: int | None) -> Group:
    once = {id(p): p for p in parameters}.values()
    return Group(
        name=name,
        last="",
        kind=class_name(module),
        count=1,
        parameters=sum(p.numel() for p in once),
        whole_bytes=sum(gathered(p) * (gather_bytes or p.element_size()) for p in once if isinstance(p, DTensor)),
        rank_bytes=held_bytes(once),
    )


def gathered(p: Tensor) -> int:
    """Elements of a sharded parameter while it is gathered: with tensor parallelism, a rank's part of it."""
    if not isinstance(p, DTensor):
        return p.numel()
    names = p.device_mesh.mesh_dim_names or ()
    parts = [
        p.device_mesh.size(i)
        for i, placement in enumerate(p.placements)
        if isinstance(placement, Shard) and i < len(names) and names[i] == _CUT
    ]
    return p.numel() // math.prod(parts)


def _joined(found: Iterable[Group]) -> Iterator[Group]:
    """Make one entry of groups in a row that differ in their name alone."""
    previous: Group | None = None
    for each in found:
        if previous is not None:
            if replace(each, name=previous.name, last=previous.last, count=previous.count) == previous:
                previous = replace(previous, last=each.name, count=previous.count + 1)
                continue
            yield previous
        previous = each
    if previous is not None:
        yield previous
