"""Which part of a DTensor this process holds, by index; torch has only the offset of parts without gaps."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard


def reshard(module: nn.Module) -> None:
    """Let the parameters of a module be the DTensors that its optimizer trains.

    FSDP2 keeps those of its outermost group whole after a forward without a backward, as in validation; until the next
    one, ``named_parameters`` then has other tensors.
    """
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.reshard()


def class_name(module: nn.Module) -> str:
    """The name of a module's class as its author wrote it: sharding gives it a class ``FSDP<Name>``."""
    kind = type(module)
    is_sharded = any(each.__name__ == "FSDPModule" for each in kind.__mro__)
    return kind.__name__.removeprefix("FSDP") if is_sharded and kind.__name__ != "FSDPModule" else kind.__name__


def held_indices(tensor: DTensor) -> list[Tensor]:
    """The indices along each dimension of the whole tensor that this process holds, in the order of its local tensor.

    Args:
        tensor: of any mesh.

    Returns:
        For each dimension a 1-d tensor of whole numbers; empty if nothing is held.

    Raises:
        ValueError: if the processes hold summands of it.
    """
    held = [torch.arange(size) for size in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # a process outside of the mesh
        return [each[:0] for each in held]
    for i, placement in enumerate(tensor.placements):
        if placement.is_partial():
            raise ValueError("a DTensor of which each process holds a summand")
        dim = _dim(placement)
        if dim is not None:
            parts, _ = _along_rows(placement)._split_tensor(
                held[dim], tensor.device_mesh.size(i), with_padding=False, contiguous=False
            )
            held[dim] = parts[coordinate[i]]
    return held


def held_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that this process holds of tensors, each counted once."""
    found = {id(each): held_part(each) for each in tensors}
    return sum(each.numel() * each.element_size() for each in found.values())


def like(tensor: DTensor, local: Tensor) -> DTensor:
    """A DTensor with the shape and placements of another one.

    Args:
        tensor: the other one; nothing is read from it.
        local: this process's part.
    """
    return DTensor.from_local(
        local.to(tensor.to_local().device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _dim(placement: Placement) -> int | None:
    return placement.dim if isinstance(placement, Shard | _StridedShard) else None


def _along_rows(placement: Placement) -> Shard | _StridedShard:
    if isinstance(placement, _StridedShard):
        return _StridedShard(0, split_factor=placement.split_factor)
    return Shard(0)
