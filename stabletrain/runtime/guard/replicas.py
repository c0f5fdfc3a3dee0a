"""Finds parameters of which ranks have different copies, by their bits.

Every rank computes a checksum of each part of a parameter that it holds. Ranks that hold the same part (all of a plain
parameter, or the same shard on another replica of the mesh) must have the same checksum. One all-gather of four numbers
per rank tells whether they do; only if not, the checksums themselves are gathered to name the parameters and the ranks.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stabletrain.runtime import gradients
from stabletrain.runtime.ranks import Ranks

_WORDS = {1: torch.uint8, 2: torch.int16}
"""Integer types for elements of one and two bytes; all others are read as words of four."""

_ROUNDING = 1e-3
"""Relative difference of gradient norms that kernels which add in any order may cause; a part of a gradient that was
not summed differs by more."""


class Part(NamedTuple):
    """What a rank holds of a parameter.

    Args:
        name: of the parameter.
        place: which part of the whole it is, ``""`` for all of it on every rank of the run; ranks with the same name
            and place have copies of each other.
        trained: whether the parameter requires a gradient.
    """

    name: str
    place: str
    trained: bool


class Difference(NamedTuple):
    """A part whose copies differ.

    Args:
        name: of the parameter.
        ranks: those whose copy deviates from that of most ranks; if there is no majority, all that hold a copy.
        missing: ranks that do not have the parameter; then ``ranks`` is empty.
    """

    name: str
    ranks: list[int]
    missing: list[int]

    def __str__(self) -> str:
        if self.missing:
            return f"{self.name} (missing on {_ranks(self.missing)})"
        return f"{self.name} ({_ranks(self.ranks)})"


def differing_copies(ranks: Ranks, module: nn.Module) -> list[Difference]:
    """The parameters of a module whose copies differ between ranks; the same answer on all ranks. A collective.

    Frozen parameters count, too. Left out are plain parameters that nothing keeps equal (`Ranks.placement`), and
    frozen parameters that only some ranks have. Buffers are not compared.

    Args:
        ranks: of the fit.
        module: that is trained, with its weights loaded.
    """
    if ranks.size == 1:
        return []
    held = list(_held(ranks, module))
    parts = [part for part, _ in held]
    sums = checksums([tensor for _, tensor in held])
    rows = ranks.gather_numbers([*_summary(parts, sums, on_all=True), *_summary(parts, sums, on_all=False)])
    # every rank has all replicated parameters; of shards it has those of its place, and some ranks have the same
    whole, shards = zip(*((tuple(row[:2]), tuple(row[2:])) for row in rows), strict=True)
    if len(set(whole)) == 1 and len({names for names, _ in shards}) == len(set(shards)):
        return []
    everyone = ranks.gather(dict(zip(parts, sums, strict=True)))
    return list(_differences(everyone))


def differ_by_rounding(ranks: Ranks, module: nn.Module, names: Iterable[str]) -> set[str]:
    """Of parameters whose copies differ, those whose gradients differ by rounding errors only. A collective.

    Ranks that see the same data compute the same gradient, but a kernel that adds in any order rounds differently on
    each of them. A gradient that covers a part of the model only differs by much more.

    Args:
        ranks: of the fit.
        module: that is trained; gradients are those of the step in progress, or of the last one.
        names: the same on all ranks.
    """
    names = list(names)
    found = dict(module.named_parameters())
    values = [found[name].grad if name in found else None for name in names]
    norms = [-1.0 if g is None else float(gradients.local(g).double().norm()) for g in values]
    smallest, largest = -ranks.max_each([-n for n in norms]), ranks.max_each(norms)
    close = (smallest >= 0) & (largest - smallest <= _ROUNDING * largest)
    return {name for name, each in zip(names, close.tolist(), strict=True) if each}


def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """For each tensor the sum of its bits as integers: a single flipped bit changes it. One read from the device."""
    if not tensors:
        return []
    with torch.no_grad():
        sums = [_bits(each).sum(dtype=torch.int64) for each in tensors]
    return [int(each) for each in torch.stack([each.to(sums[0].device) for each in sums]).tolist()]


def _bits(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().view(-1)
    if flat.is_conj() or flat.is_neg():
        flat = flat.resolve_conj().resolve_neg()
    return flat.view(_WORDS.get(flat.element_size(), torch.int32))


def _held(ranks: Ranks, module: nn.Module) -> Iterator[tuple[Part, Tensor]]:
    """The parts that this rank holds of the parameters whose copies must be equal, with their values."""
    for name, p in module.named_parameters():
        if p.is_meta or isinstance(p, nn.parameter.UninitializedParameter):
            continue
        if isinstance(p, DTensor):
            place, values = _place(p, ranks.size), p._local_tensor
        elif ranks.placement(p) == "replicated":
            place, values = "", p
        else:
            continue
        for suffix, plain in _plain_tensors(values):
            yield Part(name + suffix, place, p.requires_grad), plain


def _place(p: DTensor, size: int) -> str:
    """The position of this rank's part: the ranks of its mesh, and its coordinates where the mesh cuts the tensor."""
    mesh, coordinates = p.device_mesh, p.device_mesh.get_coordinate() or ()
    cut = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not cut and mesh.size() == size:
        return ""
    return f"{zlib.crc32(repr(mesh.mesh.tolist()).encode())}:{[(i, coordinates[i]) for i in cut if coordinates]}"


def _plain_tensors(tensor: Tensor, suffix: str = "") -> Iterator[tuple[str, Tensor]]:
    """A tensor, or the plain ones in a tensor that wraps others (quantised weights)."""
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for attribute in tensor.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(tensor, attribute), f"{suffix}.{attribute}")
    else:
        yield suffix, tensor


def _summary(parts: Sequence[Part], sums: Sequence[int], on_all: bool) -> tuple[int, int]:
    """A checksum of the names and places of all parts of one kind, and one of their values."""
    chosen = [(part, value) for part, value in zip(parts, sums, strict=True) if (part.place == "") == on_all]
    names = zlib.crc32(repr([part for part, _ in chosen]).encode())
    return names, zlib.crc32(repr([value for _, value in chosen]).encode())


def _differences(everyone: Sequence[dict[Part, int]]) -> Iterator[Difference]:
    for part in dict.fromkeys(part for rank in everyone for part in rank):
        values = {i: rank[part] for i, rank in enumerate(everyone) if part in rank}
        missing = [i for i in range(len(everyone)) if i not in values]
        if missing and part.place == "":
            if part.trained:
                yield Difference(part.name, [], missing)
        elif len(set(values.values())) > 1:
            (most, count), *_ = Counter(values.values()).most_common()
            deviating = [i for i, value in values.items() if value != most]
            yield Difference(part.name, deviating if 2 * count > len(values) else list(values), [])


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
