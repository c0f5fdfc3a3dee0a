"""What a ring of snapshots costs in memory: said before it is taken, and refused if it is too much."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from stabletrain.errors import UserError
from stabletrain.runtime.snapshot_buffers import bytes_of

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)\s*", re.IGNORECASE)


def parse(text: str) -> float | None:
    """An amount of memory in bytes; None if it is not understood.

    >>> parse("8GB"), parse("0.5 MiB"), parse("8")
    (8000000000.0, 524288.0, None)
    """
    match = _MEMORY.fullmatch(text)
    return float(match[1]) * _UNITS[match[2].upper()] if match and match[2].upper() in _UNITS else None


def shown(amount: float) -> str:
    """An amount of memory for people.

    >>> shown(8.04e9), shown(512)
    ('8.04 GB', '512 B')
    """
    for unit in ("TB", "GB", "MB", "KB"):
        if amount >= _UNITS[unit]:
            return f"{amount / _UNITS[unit]:.3g} {unit}"
    return f"{amount:.0f} B"


def check(copies: int, keep: int, batch: Any, batches: int, max_memory: str | None, spill: str | None) -> str:
    """One sentence on what will be taken.

    Args:
        copies: bytes of all snapshots together.
        keep: how many they are.
        batch: one of the batches that the tape remembers.
        batches: how many it remembers.
        max_memory: the limit; None: there is none.
        spill: a folder: the snapshots take no memory.

    Raises:
        UserError: if it is more than the limit.
    """
    remembered = batches * bytes_of([leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)])
    needed = remembered + (0 if spill else copies)
    what = f"{keep} snapshots of {shown(copies / keep)} and {batches} batches of {shown(remembered / batches)}"
    limit = None if max_memory is None else parse(max_memory)
    if limit is not None and needed > limit:
        raise UserError(
            f"rollback: {what} take {shown(needed)} of memory on each rank, more than max_memory={max_memory}. Keep "
            "fewer (plugins.spike.keep), take them more often, so that fewer batches are remembered "
            "(plugins.spike.every), put them on disk (plugins.spike.spill=<folder>), or raise plugins.spike.max_memory"
        )
    return f"rollback keeps up to {what}: {shown(needed)} of memory" + (f", the snapshots in {spill}" if spill else "")
