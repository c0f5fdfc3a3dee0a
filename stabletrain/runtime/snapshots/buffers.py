"""Copies of tensors in memory, at the speed of a plain memcpy: into buffers that are allocated and touched beforehand.

A fresh page of memory costs a page fault on its first write, which makes a copy into new tensors 3 to 60 times slower
than one into buffers that have been written before. So buffers are kept, and used again while the layout is the same.
One thread with ordinary stores does not reach the memory's speed, so a large copy is shared by a few: training waits
for it, and the processor's cores have nothing else to do.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from threading import Thread
from typing import Literal, TypeAlias

import torch
from torch import Tensor

_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_WORTH_THREADS = 32 << 20
"""Bytes from which starting threads (0.1 ms each) pays."""

Where: TypeAlias = Literal["host", "device"]
_Layout: TypeAlias = tuple[torch.dtype, torch.Size, tuple[int, ...], torch.device]


class SnapshotBuffers:
    """Buffers for one snapshot of a list of tensors.

    Args:
        where: ``"host"``: in main memory, page-locked for tensors on CUDA; ``"device"``: beside each tensor, which
            takes device memory and copies at its speed.

    >>> weights = [torch.arange(3.0), torch.ones(2, 2)]
    >>> snapshot = SnapshotBuffers()
    >>> snapshot.copy_in(weights)
    >>> weights[0].zero_().tolist()
    [0.0, 0.0, 0.0]
    >>> snapshot.copy_back(weights)
    >>> weights[0].tolist()
    [0.0, 1.0, 2.0]
    """

    def __init__(self, where: Where = "host") -> None:
        self._where = where
        self._layouts: list[_Layout] = []
        self._buffers: list[Tensor] = []

    @property
    def tensors(self) -> list[Tensor]:
        """The copies, one for each plain tensor of the last `copy_in`; written again by the next one."""
        return list(self._buffers)

    @property
    def nbytes(self) -> int:
        """Memory in use, bytes."""
        return bytes_of(self._buffers)

    def prepare(self, tensors: Sequence[Tensor]) -> None:
        """Allocate and touch what ``copy_in(tensors)`` needs, so that it costs the copy alone.

        Buffers of the layout before are used again; those without a use are given back.

        Args:
            tensors: as for `copy_in`; their values do not matter.
        """
        self._fit(plain_tensors(tensors))

    def copy_in(self, tensors: Sequence[Tensor]) -> None:
        """Take a copy; when this returns, the tensors may change again.

        Args:
            tensors: of any dtype, shape, device and stride; DTensors and wrapper subclasses give their local parts.
        """
        sources = plain_tensors(tensors)
        self._fit(sources)
        copy_each(self._buffers, sources)

    def copy_back(self, tensors: Sequence[Tensor]) -> None:
        """Write the copies into tensors, in place.

        Args:
            tensors: a list of the layout that was copied in.

        Raises:
            ValueError: if number, dtype or shape differ from what was copied in.
        """
        targets = plain_tensors(tensors)
        mine = [(each.dtype, each.shape) for each in self._buffers]
        if mine != [(each.dtype, each.shape) for each in targets]:
            raise ValueError(
                f"expected the {len(mine)} tensors that were copied in, got {len(targets)} of other layout"
            )
        copy_each(targets, self._buffers)

    def clear(self) -> None:
        """Give all memory back."""
        self._layouts, self._buffers = [], []

    def _fit(self, sources: list[Tensor]) -> None:
        layouts = [(each.dtype, each.shape, each.stride(), each.device) for each in sources]
        if layouts == self._layouts:
            return
        spare: defaultdict[_Layout, list[Tensor]] = defaultdict(list)
        for layout, buffer in zip(self._layouts, self._buffers, strict=True):
            spare[layout].append(buffer)
        kept = [spare[layout].pop() if spare[layout] else None for layout in layouts]
        spare.clear()
        self.clear()  # before anything is allocated: what has no use any more must not add to the peak
        self._buffers = [self._touched(source) if buffer is None else buffer for buffer, source in zip(kept, sources)]  # noqa: B905
        self._layouts = layouts

    def _touched(self, source: Tensor) -> Tensor:
        to_host = self._where == "host" and source.device.type != "cpu"
        buffer = torch.empty_like(
            source, device="cpu" if to_host else None, pin_memory=to_host and torch.cuda.is_available()
        )
        return buffer.zero_()


def plain_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The plain tensors that hold the data: a DTensor's local one, the inner ones of a wrapper subclass.

    Args:
        tensors: any tensors.
    """
    found: list[Tensor] = []
    for tensor in tensors:
        if hasattr(tensor, "to_local"):
            found += plain_tensors([tensor.to_local()])
        elif hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            found += plain_tensors([getattr(tensor, name) for name in names])
        else:
            found.append(tensor.detach())
    return found


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Size of plain tensors in bytes.

    >>> bytes_of([torch.zeros(3), torch.zeros(2, dtype=torch.int8)])
    14
    """
    return sum(each.numel() * each.element_size() for each in tensors)


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy plain tensors one by one, at the memory's speed; when this returns, host copies are complete.

    Args:
        targets: written in place.
        sources: as many, of the same dtypes and shapes.
    """
    on_host: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for pair in zip(targets, sources, strict=True):
        (on_host if all(each.device.type == "cpu" for each in pair) else others).append(pair)
    _copy_pairs(others)  # queued on the device, while the host copies its own
    parts = _shares(on_host, _THREADS) if bytes_of([target for target, _ in on_host]) > _WORTH_THREADS else [on_host]
    helpers = [Thread(target=_copy_pairs, args=(part,)) for part in parts[1:]]
    for helper in helpers:
        helper.start()
    _copy_pairs(parts[0])
    for helper in helpers:
        helper.join()
    crossing = [pair for pair in others if any(each.device.type == "cpu" for each in pair)]
    for device in {each.device for pair in crossing for each in pair if each.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


def _copy_pairs(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        with torch.no_grad():
            torch._foreach_copy_(targets, sources, non_blocking=True)


def _shares(pairs: list[tuple[Tensor, Tensor]], number: int) -> list[list[tuple[Tensor, Tensor]]]:
    """About the same number of bytes for each thread: the largest first, always to the one with the least."""
    shares: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(number)]
    loads = [0] * number
    for target, source in sorted(pairs, key=lambda pair: -pair[0].nbytes):
        least = loads.index(min(loads))
        shares[least].append((target, source))
        loads[least] += target.nbytes
    return shares
