"""Copies from a CUDA device to main memory beside its other work; the host waits only when it reads them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Streams(Protocol):
    """The stream on which a device computes, and one beside it for copies. A stream works in the order of its queue."""

    def beside(self, work: Callable[[], None]) -> Any:
        """Queue work on the stream for copies, after all that is queued for computing; its end, an event."""

    def hold(self, end: Any) -> None:
        """Let what is queued for computing from now on wait for an event; the host does not wait."""

    def wait(self, end: Any) -> None:
        """Let the host wait for an event."""


class CudaStreams:
    """The current stream of a CUDA device, and a second one for copies.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def beside(self, work: Callable[[], None]) -> Any:
        """As `Streams.beside`."""
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            work()
            return self._copies.record_event()

    def hold(self, end: Any) -> None:
        """As `Streams.hold`."""
        torch.cuda.current_stream(self._device).wait_event(end)

    def wait(self, end: Any) -> None:
        """As `Streams.wait`."""
        end.synchronize()


@functools.cache
def streams_of(device: torch.device) -> Streams | None:
    """The streams of a device, the same at each call; None for a device whose copies the host makes itself."""
    return CudaStreams(device) if device.type == "cuda" else None
