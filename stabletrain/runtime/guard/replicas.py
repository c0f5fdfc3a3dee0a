"""Finds parameters, and optimizer state, of which ranks have different copies, by their bits.

Every rank computes a 64-bit number of each part that it holds. Ranks that hold the same part (all of a plain
parameter, or the same shard on another replica of the mesh) must have the same number. One all-gather of four numbers
per rank tells whether they do; only if not, the numbers themselves are gathered to name the parts and the ranks.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from stabletrain.runtime import gradients
from stabletrain.runtime.guard.bit_sums import bit_sums
from stabletrain.runtime.guard.replica_parts import Part, parameter_parts
from stabletrain.runtime.ranks import Ranks

_ROUNDING = 1e-3
"""Relative difference of gradient norms that kernels which add in any order may cause; a part of a gradient that was
not summed differs by more."""


class Difference(NamedTuple):
    """A part whose copies differ.

    Args:
        part: of a parameter or of its optimizer state.
        ranks: those whose copy deviates from that of most ranks; if there is no majority, all that hold a copy.
        missing: ranks that do not have the parameter; then ``ranks`` is empty.
        source: a rank with the copy of the majority; None if there is none.
    """

    part: Part
    ranks: list[int]
    missing: list[int]
    source: int | None = None

    @property
    def name(self) -> str:
        """Of the parameter."""
        return self.part.name

    def __str__(self) -> str:
        if self.missing:
            return f"{self.part} (missing on {named_ranks(self.missing)})"
        return f"{self.part} ({named_ranks(self.ranks)})"


def differing_copies(ranks: Ranks, module: nn.Module) -> list[Difference]:
    """The parameters of a module whose copies differ between ranks; the same answer on all ranks. A collective.

    Frozen parameters count, too. Left out are plain parameters that nothing keeps equal (`Ranks.placement`), and
    frozen parameters that only some ranks have. Buffers are not compared.

    Args:
        ranks: of the fit.
        module: that is trained, with its weights loaded.
    """
    return [] if ranks.size == 1 else compare(ranks, parameter_parts(ranks, module))


def compare(ranks: Ranks, held: Iterable[tuple[Part, Tensor]]) -> list[Difference]:
    """The parts whose copies differ between ranks; the same answer on all ranks. A collective.

    Args:
        ranks: of the fit, more than one.
        held: the parts that this rank holds, with their values.
    """
    held = list(held)
    parts = [part for part, _ in held]
    sums = bit_sums([tensor for _, tensor in held])
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


def _summary(parts: Sequence[Part], sums: Sequence[int], on_all: bool) -> tuple[int, int]:
    """A checksum of the names and places of all parts of one kind, and one of their values."""
    chosen = [(part, value) for part, value in zip(parts, sums, strict=True) if (part.place == "") == on_all]
    names = zlib.crc32(repr([part for part, _ in chosen]).encode())
    return names, zlib.crc32(repr([value for _, value in chosen]).encode())


def _differences(everyone: Sequence[dict[Part, int]]) -> Iterator[Difference]:
    for part in dict.fromkeys(part for rank in everyone for part in rank):
        values = {i: rank[part] for i, rank in enumerate(everyone) if part in rank}
        missing = [i for i in range(len(everyone)) if i not in values]
        if missing and part.place == "" and not part.state:
            if part.trained:
                yield Difference(part, [], missing)
        elif len(set(values.values())) > 1:
            (most, count), *_ = Counter(values.values()).most_common()
            if 2 * count > len(values):
                deviating = [i for i, value in values.items() if value != most]
                yield Difference(part, deviating, [], next(i for i, value in values.items() if value == most))
            else:
                yield Difference(part, list(values), [])


def named_ranks(numbers: Sequence[int]) -> str:
    """Ranks for a message.

    >>> named_ranks([0, 2])
    'ranks 0, 2'
    """
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
