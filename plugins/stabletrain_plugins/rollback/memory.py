"""What a ring of snapshots costs in memory: said before it is taken, and refused if it is too much."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stabletrain.runtime.free_memory import device_memory, host_memory
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


class Needs(NamedTuple):
    """What will be taken on a rank.

    Args:
        copies: bytes of all snapshots together.
        keep: how many they are.
        remembered: bytes of all batches that the tape remembers.
        batches: how many they are.
        spill: a folder: the snapshots take no memory.
    """

    copies: int
    keep: int
    remembered: int
    batches: int
    spill: str | None

    @classmethod
    def of(cls, copies: int, keep: int, batch: Any, batches: int, spill: str | None) -> Needs:
        """From one of the batches."""
        size = bytes_of([leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)])
        return cls(copies, keep, size * batches, batches, spill)

    def __str__(self) -> str:
        snapshots = f"{self.keep} snapshots of {shown(self.copies / self.keep)}"
        return f"{snapshots} and {self.batches} batches of {shown(self.remembered / self.batches)}"

    @property
    def memory(self) -> int:
        """Bytes of memory."""
        return self.remembered + (0 if self.spill else self.copies)

    def problem(self, max_memory: str | None, free: float) -> str | None:
        """Why it is too much; None if it is not.

        Args:
            max_memory: the limit; None: what is free.
            free: bytes that this rank may take.
        """
        limit = free if max_memory is None else parse(max_memory)
        if limit is None or self.memory <= limit:
            return None
        than = f"than the {shown(free)} that are free" if max_memory is None else f"than max_memory={max_memory}"
        raising = "" if max_memory is None else ", raise plugins.spike.max_memory"
        return (
            f"rollback: {self} take {shown(self.memory)} of memory on each rank, more {than}. Keep fewer "
            "(plugins.spike.keep), take them more often, so that fewer batches are remembered (plugins.spike.every), "
            f"put them on disk (plugins.spike.spill=<folder>){raising}, or go without (plugins/spike=detect, or "
            'default_callbacks(spike="detect"))'
        )


def free_for_a_rank(trainer: Trainer, where: str, device: torch.device) -> float:
    """Bytes that one of this machine's ranks may take for snapshots."""
    if where == "device" and device.type == "cuda":
        return device_memory(device)
    return host_memory() / trainer.num_devices
