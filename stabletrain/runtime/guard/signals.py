"""The scalars of a step, and their copy to the host."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SignalCopy:
    """Copies a vector of scalars to the host: at once on the CPU, asynchronously from CUDA.

    Args:
        scalars: shape (n,), on any device.
    """

    waits = 0
    """Number of reads by the host, over all instances; for benchmarks."""

    def __init__(self, scalars: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if scalars.device.type == "cuda":
            self._host = torch.empty(scalars.shape, dtype=scalars.dtype, pin_memory=True)
            self._host.copy_(scalars, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        else:
            self._host = scalars

    def read(self) -> list[float]:
        """The scalars; waits until the copy is complete."""
        SignalCopy.waits += 1
        if self._done is not None:
            self._done.synchronize()
        values: list[float] = self._host.tolist()
        return values


class Signals(NamedTuple):
    """The signals of one attempted step, 0-d tensors on the device."""

    loss: Tensor
    grad_norm: Tensor
    transformed_norm: Tensor

    @classmethod
    def of(cls, loss: Tensor, grad_norm: Tensor, transformed_norm: Tensor) -> Signals:
        """The signals in float64, which holds every dtype exactly; equal ones are converted once."""
        norm = grad_norm.double()
        return cls(loss.double(), norm, norm if transformed_norm is grad_norm else transformed_norm.double())

    def start_copy(self, *more: Tensor) -> SignalCopy:
        """Start the copy of these and more 0-d tensors to the host, in float64."""
        return SignalCopy(torch.stack([signal.double() for signal in (*self, *more)]).detach())
