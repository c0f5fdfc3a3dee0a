"""Norms of sharded gradients from those of their local parts, with one collective for each mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


class _Sum(NamedTuple):
    """Squares of local norms that are added up together.

    Args:
        groups: process groups over which they are added, one after the other.
        device: where the groups' collectives run.
        members: indices of the tensors.
        shares: of each the part that this rank contributes: where n ranks have the same part, each adds 1 / n of it.
    """

    groups: list[dist.ProcessGroup]
    device: torch.device
    members: list[int]
    shares: list[float]


def tensor_norms(tensors: Sequence[Tensor], local_norms: Sequence[Tensor]) -> Tensor:
    """The norm of each whole tensor, as a vector on the device of the first local norm.

    Args:
        tensors: without pending sums (`settle_partial`).
        local_norms: the norm of this rank's part of each, a 0-d tensor.
    """
    squares = [norm.double().square() for norm in local_norms]
    for each in _sums(tensors):
        mine = torch.stack([(squares[i] * share).to(each.device) for i, share in _shares(each)])
        for group in each.groups:
            dist.all_reduce(mine, group=group)
        for i, total in zip(each.members, mine, strict=True):
            squares[i] = total
    return _root(torch.stack([square.to(local_norms[0].device) for square in squares]), local_norms)


def global_norm(tensors: Sequence[Tensor], local_norms: Sequence[Tensor]) -> Tensor:
    """The norm of all whole tensors together, as a 0-d tensor on the device of the first local norm.

    One number for each mesh is exchanged, so that ranks may have gradients of different parameters.

    Args:
        tensors: as in `tensor_norms`.
        local_norms: as in `tensor_norms`.
    """
    open_sum, known = _squares(tensors, local_norms)
    if open_sum is not None:
        dist.all_reduce(open_sum)
        known.insert(0, open_sum)
    return _root(torch.stack([each.to(local_norms[0].device) for each in known]).sum(), local_norms)


class NormShare(NamedTuple):
    """What one rank contributes to a norm over all ranks.

    Args:
        square: 0-d, float64: added over all ranks it is the square of the norm.
        device: of the norm.
        dtype: of the norm.
    """

    square: Tensor
    device: torch.device
    dtype: torch.dtype

    def norm(self, square: Tensor) -> Tensor:
        """The norm, from the sum of what all ranks contribute."""
        return square.sqrt().to(self.device, self.dtype)


def share(tensors: Sequence[Tensor], local_norms: Sequence[Tensor], device: torch.device) -> NormShare:
    """What this rank contributes to the norm of all whole tensors together.

    A collective only for meshes of some ranks: each of their ranks contributes an equal part of the whole.

    Args:
        tensors: as in `tensor_norms`.
        local_norms: as in `tensor_norms`.
        device: of this process, whose tensors a collective takes.
    """
    open_sum, known = _squares(tensors, local_norms)
    parts = [each.to(device) / dist.get_world_size() for each in known]
    if open_sum is not None:
        parts.append(open_sum.to(device))
    return NormShare(torch.stack(parts).sum(), local_norms[0].device, _dtype(local_norms))


def plain_share(norm: Tensor, device: torch.device) -> NormShare:
    """What this rank contributes to the norm of plain gradients: the root of the mean square of all ranks' norms.

    That is the same on all ranks, and where all copies are equal it has the bits of ``norm``.

    Args:
        norm: a 0-d tensor.
        device: of this process, whose tensors a collective takes.
    """
    return NormShare(norm.to(device).double().square() / dist.get_world_size(), norm.device, norm.dtype)


def _squares(tensors: Sequence[Tensor], local_norms: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """The square of the global norm in parts: what all ranks have yet to add up, None if nothing is; what is known."""
    squares = [norm.double().square() for norm in local_norms]
    open_sum, known = None, []
    left = set(range(len(tensors)))
    for each in _sums(tensors):
        mine = torch.stack([(squares[i] * share).to(each.device) for i, share in _shares(each)]).sum()
        left.difference_update(each.members)
        if each.groups == [dist.group.WORLD]:
            open_sum = mine
            continue
        for group in each.groups:
            dist.all_reduce(mine, group=group)
        known.append(mine)
    return open_sum, [*known, *(squares[i] for i in sorted(left))]


def settle_partial(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with pending sums over ranks (Partial placements) carried out, in one collective for each kind."""
    settled = list(tensors)
    kinds: dict[tuple[DeviceMesh, int, str, torch.dtype], list[int]] = {}
    for i, t in enumerate(tensors):
        if isinstance(t, DTensor):
            partial = [d for d, placement in enumerate(t.placements) if placement.is_partial()]
            if len(partial) == 1 and t.placements[partial[0]].is_partial("sum"):
                kinds.setdefault((t.device_mesh, partial[0], "sum", t.dtype), []).append(i)
            elif partial:  # no gradient is known to be one
                settled[i] = t.redistribute(placements=[Replicate() if p.is_partial() else p for p in t.placements])
    for (mesh, dimension, _, _), members in kinds.items():
        parts = [tensors[i]._local_tensor for i in members]  # type: ignore[attr-defined]
        total = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(total, group=mesh.get_group(dimension))
        for i, values in zip(members, total.split_with_sizes([part.numel() for part in parts]), strict=True):
            settled[i] = _replicated(tensors[i], dimension, values)
    return settled


def _replicated(tensor: Tensor, dimension: int, values: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    placements = [Replicate() if i == dimension else each for i, each in enumerate(tensor.placements)]
    local = values.view(tensor._local_tensor.shape)
    return DTensor.from_local(
        local, tensor.device_mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _sums(tensors: Sequence[Tensor]) -> list[_Sum]:
    """Which squares are added up over which ranks.

    A mesh of all ranks needs one collective whatever its dimensions, and plain tensors, whose copies are equal, join
    it: then all ranks get the same bits. A one-dimensional mesh of some ranks needs one as well, others one for each
    dimension that cuts tensors.
    """
    if not any(isinstance(t, DTensor) for t in tensors):
        return []
    size = dist.get_world_size()
    sums: dict[object, _Sum] = {}
    plain: list[int] = []
    for i, t in enumerate(tensors):
        if not isinstance(t, DTensor):
            plain.append(i)
            continue
        mesh = t.device_mesh
        cut = tuple(d for d, placement in enumerate(t.placements) if not placement.is_replicate())
        device = (
            t.device if t.device.type == mesh.device_type else torch.device(mesh.device_type)
        )  # parameters offloaded
        if mesh.size() == size:
            copies = size
            for d in cut:
                copies //= mesh.size(d)
            found = sums.setdefault(size, _Sum([dist.group.WORLD], device, [], []))  # type: ignore[list-item]
        elif cut:
            copies = 1
            found = sums.setdefault((mesh, cut), _Sum([mesh.get_group(d) for d in cut], device, [], []))
        else:
            continue
        found.members.append(i)
        found.shares.append(1.0 / copies)
    if size in sums:
        sums[size].members.extend(plain)
        sums[size].shares.extend([1.0 / size] * len(plain))
    return list(sums.values())


def _shares(each: _Sum) -> list[tuple[int, float]]:
    return list(zip(each.members, each.shares, strict=True))


def _root(squares: Tensor, local_norms: Sequence[Tensor]) -> Tensor:
    return squares.sqrt().to(_dtype(local_norms))


def _dtype(local_norms: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(norm.dtype == torch.float64 for norm in local_norms) else torch.float32
