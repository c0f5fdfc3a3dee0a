"""Copies of tensors in memory at the speed of a plain memcpy, into buffers allocated and written beforehand.

The first write to a fresh page of memory costs a page fault, which makes a copy into new tensors 3 to 60 times slower
than one into buffers that have been written before. So buffers are reused while the layout stays the same. One thread
cannot use the full memory bandwidth, so a large copy is divided among up to four threads; the cores are idle then,
because training waits for the copy.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from threading import Thread
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from stabletrain.runtime.snapshots import streams
from stabletrain.runtime.snapshots.tensor_kinds import plain_tensors as plain_tensors

_THREADS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
_THREADS_FROM = 32 << 20
"""Size of a copy in bytes from which on several threads are used; starting a thread costs 0.1 ms."""

Where: TypeAlias = Literal["host", "device"]
_Layout: TypeAlias = tuple[torch.dtype, torch.Size, tuple[int, ...], torch.device]


class _Copying(NamedTuple):
    """Copies from a device that may not be complete.

    Args:
        streams: of the device.
        end: of all copies.
        sources: kept, so that their memory is not used for other tensors before they are read.
    """

    streams: streams.Streams
    end: Any
    sources: list[Tensor]


class SnapshotBuffers:
    """Buffers for one snapshot of a list of tensors.

    Args:
        where: ``"host"``: in main memory, page-locked for tensors on CUDA; ``"device"``: on each tensor's device, which
            takes device memory and copies at its bandwidth.

    >>> weights = [torch.arange(3.0), torch.ones(2, 2)]
    >>> snapshot = SnapshotBuffers()
    >>> snapshot.copy_in(weights)
    >>> weights[0].zero_().tolist()
    [0.0, 0.0, 0.0]
    >>> snapshot.copy_back(weights)
    >>> weights[0].tolist()
    [0.0, 1.0, 2.0]
    """

    page_locked = True
    """Whether buffers in main memory for tensors on CUDA are page-locked, as a copy that does not wait needs."""

    def __init__(self, where: Where = "host") -> None:
        self._where = where
        self._copying: _Copying | None = None
        self._layouts: list[_Layout] = []
        self._buffers: list[Tensor] = []

    @property
    def tensors(self) -> list[Tensor]:
        """The copies, one for each plain tensor of the last `copy_in`; the next `copy_in` overwrites them."""
        self._wait()
        return list(self._buffers)

    @property
    def nbytes(self) -> int:
        """Memory in use, bytes."""
        return bytes_of(self._buffers)

    def prepare(self, tensors: Sequence[Tensor]) -> None:
        """Allocate and touch the buffers for ``copy_in(tensors)``, so that it costs only the copy.

        Existing buffers of a fitting layout are used again; the others are freed.

        Args:
            tensors: as for `copy_in`; their values are not read.
        """
        self._fit(plain_tensors(tensors))

    def copy_in(self, tensors: Sequence[Tensor], steady: Collection[int] | None = None) -> None:
        """Copy tensors into the buffers; when this returns, the tensors may change again, those of ``steady`` excepted.

        Args:
            tensors: of any dtype, shape, device and stride; see `plain_tensors` for DTensors and wrapper subclasses.
            steady: the host does not wait for copies from a CUDA device to main memory, which order themselves before
                what the device does next; these plain tensors, by index, must not change before `let_change`: they
                are copied beside the device's other work. None: the host waits.
        """
        self._wait()
        sources = plain_tensors(tensors)
        self._fit(sources)
        found = None if steady is None else self._streams(sources)
        if steady is None or found is None:
            copy_each(self._buffers, sources)
            return
        device, beside = found
        pairs = list(zip(self._buffers, sources, strict=True))
        soon = [pair for i, pair in enumerate(pairs) if pair[1].device == device and i not in steady]
        later = [pair for i, pair in enumerate(pairs) if pair[1].device == device and i in steady]
        own = [pair for pair in pairs if pair[1].device != device]
        first = beside.beside(lambda: _copy_pairs(soon))
        end = beside.beside(lambda: _copy_pairs(later))
        beside.hold(first)
        self._copying = _Copying(beside, end, [source for _, source in later])
        copy_each([target for target, _ in own], [source for _, source in own])

    def let_change(self) -> None:
        """What the device does from now on waits until all tensors are copied; the host does not wait."""
        if self._copying is not None:
            self._copying.streams.hold(self._copying.end)
            self._copying.sources.clear()

    def copy_back(self, tensors: Sequence[Tensor]) -> None:
        """Copy the buffers into tensors, in place.

        Args:
            tensors: as many as were copied in, of the same dtypes and shapes.

        Raises:
            ValueError: if number, dtype or shape differ from what was copied in.
        """
        self._wait()
        targets = plain_tensors(tensors)
        expected, got = ([(each.dtype, each.shape) for each in some] for some in (self._buffers, targets))
        if expected != got:
            raise ValueError(
                f"expected {len(expected)} tensors with the dtypes and shapes that were copied in, got {len(got)} with "
                "others; pass the same tensors as to copy_in"
            )
        copy_each(targets, self._buffers)

    def clear(self) -> None:
        """Free all buffers."""
        self._wait()
        self._layouts, self._buffers = [], []

    def _wait(self) -> None:
        if self._copying is not None:
            self.let_change()
            self._copying.streams.wait(self._copying.end)
            self._copying = None

    def _streams(self, sources: list[Tensor]) -> tuple[torch.device, streams.Streams] | None:
        """The one device whose tensors are copied to main memory, and its streams; None: the host waits for copies."""
        if self._where != "host" or not self.page_locked:
            return None
        found = [(device, streams.streams_of(device)) for device in {each.device for each in sources}]
        crossing = [(device, of_device) for device, of_device in found if of_device is not None]
        return crossing[0] if len(crossing) == 1 else None

    def _fit(self, sources: list[Tensor]) -> None:
        layouts = [(each.dtype, each.shape, each.stride(), each.device) for each in sources]
        if layouts == self._layouts:
            return
        spare: defaultdict[_Layout, list[Tensor]] = defaultdict(list)
        for layout, buffer in zip(self._layouts, self._buffers, strict=True):
            spare[layout].append(buffer)
        reused = [spare[layout].pop() if spare[layout] else None for layout in layouts]
        spare.clear()
        self.clear()  # frees unused buffers before new ones are allocated, so that they do not add to the peak
        self._buffers = [
            self._allocate(source) if buffer is None else buffer for buffer, source in zip(reused, sources, strict=True)
        ]
        self._layouts = layouts

    def _allocate(self, source: Tensor) -> Tensor:
        to_host = self._where == "host" and source.device.type != "cpu"
        buffer = torch.empty_like(
            source, device="cpu" if to_host else None, pin_memory=to_host and torch.cuda.is_available()
        )
        return buffer.zero_()


def bytes_of(tensors: Sequence[Tensor]) -> int:
    """Size of plain tensors in bytes.

    >>> bytes_of([torch.zeros(3), torch.zeros(2, dtype=torch.int8)])
    14
    """
    return sum(each.nbytes for each in tensors)


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy plain tensors one by one at the memory's bandwidth; when this returns, copies to and from host are complete.

    Args:
        targets: written in place.
        sources: as many, of the same dtypes and shapes.
    """
    on_host: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for pair in zip(targets, sources, strict=True):
        (on_host if pair[0].is_cpu and pair[1].is_cpu else others).append(pair)
    _copy_pairs(others)  # queued on the device, meanwhile the host copies its own
    parts = _shares(on_host, _THREADS) if bytes_of([target for target, _ in on_host]) > _THREADS_FROM else [on_host]
    helpers = [Thread(target=_copy_pairs, args=(part,)) for part in parts[1:]]
    for helper in helpers:
        helper.start()
    _copy_pairs(parts[0])
    for helper in helpers:
        helper.join()
    crossing = [pair for pair in others if pair[0].is_cpu or pair[1].is_cpu]
    for device in {each.device for pair in crossing for each in pair if each.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


def _copy_pairs(pairs: list[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        with torch.no_grad():
            torch._foreach_copy_(targets, sources, non_blocking=True)


def _shares(pairs: list[tuple[Tensor, Tensor]], number: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Divide pairs among threads, about the same bytes for each: the largest first, to the thread with the least."""
    shares: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(number)]
    loads = [0] * number
    for target, source in sorted(pairs, key=lambda pair: -pair[0].nbytes):
        least = loads.index(min(loads))
        shares[least].append((target, source))
        loads[least] += target.nbytes
    return shares
