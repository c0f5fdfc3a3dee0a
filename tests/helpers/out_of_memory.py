"""A module that runs out of memory, in the forward or backward pass, with more than some rows at once."""

from __future__ import annotations

from typing import Any

import torch
from fits import HEALTHY, Net
from torch import Tensor


class Hungry(Net):
    """Fails with more than ``limit`` rows, in the batches from ``since`` on.

    Args:
        limit: of rows.
        where: ``forward``, ``backward``, or ``cpu``: with torch's message on the CPU.
        since: first batch that fails.
        optimizer: a name in ``fits.OPTIMIZERS``.
        dropout: its probability.
    """

    def __init__(
        self, limit: int, where: str = "forward", since: int = 0, optimizer: str = "sgd-momentum", dropout: float = 0.0
    ) -> None:
        super().__init__(optimizer, norm=False, dropout=dropout)
        self.limit, self.where, self.since = limit, where, since
        self.register_buffer("seen", torch.zeros(()))
        self.failures = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, fault = batch if isinstance(batch, tuple | list) else (batch, HEALTHY)
        self.seen += len(x)
        too_much = len(x) > self.limit and batch_idx >= self.since and torch.is_grad_enabled()
        if too_much:
            self.failures += 1
        if too_much and self.where == "cpu":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        if too_much and self.where == "forward":
            raise torch.OutOfMemoryError("simulated")
        loss = super().training_step((x, fault), batch_idx)
        if too_much:
            first = next(self.parameters())
            handle: Any = first.register_hook(lambda _: self._fail(handle))  # type: ignore[no-untyped-call]
        return loss

    @staticmethod
    def _fail(handle: Any) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("simulated in backward")
