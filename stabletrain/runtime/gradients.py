"""Functions that read, scale and clamp gradients of all kinds of tensors.

Gradients may be plain tensors, DTensors (FSDP2, tensor parallelism; also mixed, also on several meshes) or sparse.
Plain tensors take a fast path; for all kinds, a norm is that of the *whole* tensor, on every rank. `sharded_norms` has
the collectives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain.runtime.internals import sharded_norms
from stabletrain.runtime.internals.flatten import flatten
from stabletrain.runtime.internals.sharded_norms import NormShare

_LOW_PRECISION = (torch.float16, torch.bfloat16)

_SMALL = 2**14
"""Number of elements up to which copying all gradients into one tensor is faster than one kernel per tensor."""
_SMALL_EACH, _AT_MOST = 2**12, 2**18
"""On the CPU it is faster up to so many elements per tensor, and not more than so many together."""


def of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of those parameters that have one."""
    return [p.grad for p in parameters if p.grad is not None]


def local(gradient: Tensor) -> Tensor:
    """The values of a gradient that live on this rank, as a plain tensor that shares memory with it."""
    if isinstance(gradient, DTensor):
        return gradient._local_tensor
    return gradient._values() if gradient.is_sparse else gradient


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of all gradients together, in float32 (float64 for float64 gradients), as a 0-d tensor.

    Reads the gradients once, without a device synchronization. If gradients are sharded, all ranks must call it, also
    those whose shards are empty: one collective for each mesh.

    Args:
        gradients: of any kind.
    """
    if not gradients:
        return torch.zeros(())
    for g in gradients:  # a loop: any() with a generator takes three times as long, at every step
        if isinstance(g, DTensor):
            return sharded_norms.global_norm(*_with_local_norms(gradients))
    return _plain_norm(gradients)


def norm_share(gradients: Sequence[Tensor], device: torch.device) -> NormShare:
    """As `global_norm`, but all ranks get the same norm, and it is left to the caller to add up what they contribute.

    Where the copies of a plain gradient differ, they count with their mean square. A collective only for gradients on
    meshes that hold some ranks, and for pending sums.

    Args:
        gradients: of any kind; may be empty on some ranks.
        device: of this process, whose tensors a collective takes.
    """
    if any(isinstance(g, DTensor) for g in gradients):
        return sharded_norms.share(*_with_local_norms(gradients), device)
    norm = _plain_norm(gradients) if gradients else torch.zeros((), device=device)
    return sharded_norms.plain_share(norm, device)


def tensor_norms(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each gradient, as a vector on the first gradient's device.

    If gradients are sharded, all ranks must call it: one collective for each mesh.
    """
    if _alike(gradients):
        return torch.stack(_norms(gradients))
    return sharded_norms.tensor_norms(*_with_local_norms(gradients))


def unit_norms(tensors: Sequence[Tensor]) -> Tensor:
    """The L2 norm of every output unit of gradients or parameters, as one vector, in float32 (float64 for float64).

    The units of a tensor with two dimensions or more are its rows (one index of the first dimension); any other
    tensor is one unit. Of a sharded tensor these are the units of which this rank holds a part, each with the norm of
    the whole unit. If tensors are sharded, all ranks must call it, also those whose shards are empty.
    """
    with torch.no_grad():
        whole = sharded_norms.settle_partial(tensors)
        norms = [_local_unit_norms(local(t)) for t in whole]
        for group, members in _units_split_over(whole).items():
            squares = torch.cat([norms[i] for i in members]).square()
            dist.all_reduce(squares, group=group)
            sizes = [len(norms[i]) for i in members]
            for i, joined in zip(members, squares.sqrt().split_with_sizes(sizes), strict=True):
                norms[i] = joined
        return torch.cat([n.to(norms[0].device) for n in norms])


def scale_units_(gradients: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each output unit by its own factor, in place.

    Args:
        gradients: any gradients that are not sparse.
        factors: one for each unit, in the order of `unit_norms`.
    """
    with torch.no_grad():
        values = [local(g) for g in gradients]
        parts = factors.split_with_sizes([len(v) if v.ndim > 1 else 1 for v in values])
        for v, factor in zip(values, parts, strict=True):
            factor = factor.to(v.device, v.dtype)
            v.mul_(factor.view(-1, *(1,) * (v.ndim - 1)) if v.ndim > 1 else factor.squeeze(0))


def scale_(gradients: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply all gradients by one factor, in place."""
    with torch.no_grad():
        for group in _by_device_and_dtype([local(g) for g in gradients]):
            if isinstance(factor, Tensor):
                torch._foreach_mul_(group, factor.to(group[0].device, group[0].dtype))
            else:
                torch._foreach_mul_(group, factor)


def scale_each_(gradients: Sequence[Tensor], factors: Tensor) -> None:
    """Multiply each gradient by its own factor, in place.

    Args:
        gradients: n gradients.
        factors: shape (n,).
    """
    with torch.no_grad():
        for g, factor in zip(gradients, factors.unbind(), strict=True):
            values = local(g)
            values.mul_(factor.to(values.device, values.dtype))


def clamp_(gradients: Sequence[Tensor], limit: float) -> None:
    """Clamp every element to [-limit, limit], in place: of complex numbers both parts. NaN stays NaN."""
    coalesce_(gradients)
    with torch.no_grad():
        for group in _by_device_and_dtype([_real(local(g)) for g in gradients]):
            torch._foreach_clamp_max_(group, limit)
            torch._foreach_clamp_min_(group, -limit)


def coalesce_(gradients: Sequence[Tensor]) -> None:
    """Add up the entries of each element of sparse gradients, in place: an element is the sum of its entries."""
    with torch.no_grad():
        for g in gradients:
            if g.is_sparse and not g.is_coalesced():
                g.copy_(g.coalesce())


def _alike(tensors: Sequence[Tensor]) -> bool:
    dtype, device = tensors[0].dtype, tensors[0].device
    return all(type(t) is Tensor and t.dtype is dtype and t.device == device and not t.is_sparse for t in tensors)


def _real(values: Tensor) -> Tensor:
    """The same memory as real numbers; a conjugate view is undone, since only the signs differ."""
    if not values.is_complex():
        return values
    return torch.view_as_real(values.conj() if values.is_conj() else values)


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _LOW_PRECISION else dtype


def _norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The norms of plain tensors of one type on one device, which are all dense."""
    dtype = torch.float32 if tensors[0].dtype in _LOW_PRECISION else None
    return list(torch._foreach_norm(tensors, 2, dtype=dtype))  # type: ignore[arg-type]


def _plain_norm(gradients: Sequence[Tensor]) -> Tensor:
    values = flatten(gradients) if _is_small(gradients) else tensor_norms(gradients)
    norm: Tensor = torch.linalg.vector_norm(values)
    return norm


def _is_small(gradients: Sequence[Tensor]) -> bool:
    """Whether the norm of one vector with all elements is the faster one; they are then alike."""
    dtype, device = gradients[0].dtype, gradients[0].device
    limit = min(max(_SMALL, _SMALL_EACH * len(gradients)), _AT_MOST) if device.type == "cpu" else _SMALL
    if dtype in _LOW_PRECISION:
        return False
    for g in gradients:  # one pass, which ends at the first large one
        limit -= g.numel()
        if limit < 0 or type(g) is not Tensor or g.dtype is not dtype or g.is_sparse or g.device != device:
            return False
    return True


def _with_local_norms(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors of any kind, with pending sums over ranks carried out, and the norm of this rank's part of each."""
    whole = sharded_norms.settle_partial(tensors)
    parts = [local(t.coalesce() if t.is_sparse else t) for t in whole]
    norms = list(parts)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault((part.device, part.dtype), []).append(i)
    for members in groups.values():
        for i, norm in zip(members, _norms([parts[i] for i in members]), strict=True):
            norms[i] = norm
    return whole, norms


def _local_unit_norms(values: Tensor) -> Tensor:
    dtype = _accumulate(values.dtype)
    within = tuple(range(1, values.ndim)) or None
    norms: Tensor = torch.linalg.vector_norm(values, dim=within, dtype=dtype)
    return norms if values.ndim > 1 else norms.view(1)


def _units_split_over(tensors: Sequence[Tensor]) -> dict[dist.ProcessGroup, list[int]]:
    """Process groups whose ranks hold parts of the same unit, with the indices of the tensors that are split so."""
    groups: dict[dist.ProcessGroup, list[int]] = {}
    for i, t in enumerate(tensors):
        if isinstance(t, DTensor):
            for mesh_dim, placement in enumerate(t.placements):
                cut = getattr(placement, "dim", None)  # every kind of shard has it, a replica does not
                if cut is not None and (t.ndim == 1 or cut != 0):
                    groups.setdefault(t.device_mesh.get_group(mesh_dim), []).append(i)
    return groups


def _by_device_and_dtype(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        groups.setdefault((t.device, t.dtype), []).append(t)
    return list(groups.values())
