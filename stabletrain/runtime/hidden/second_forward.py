"""The buffers of a block whose forward pass is computed a second time during backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class SecondForward:
    """The buffers of a block as they were before its forward pass, for the second one.

    Args:
        block: whose forward pass begins.
    """

    def __init__(self, block: nn.Module) -> None:
        self._buffers = list(block.buffers())
        self._before = [each.detach().clone() for each in self._buffers]

    def contexts(self) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
        """Those of the first and of the second forward pass, as `torch.utils.checkpoint.checkpoint` takes them."""
        return contextlib.nullcontext(), self._second()

    @contextlib.contextmanager
    def put_back_after(self) -> Iterator[None]:
        """What the block changes within it is put back."""
        try:
            yield
        finally:
            self._write(self._before)

    @contextlib.contextmanager
    def _second(self) -> Iterator[None]:
        now = [each.detach().clone() for each in self._buffers]
        self._write(self._before)
        try:
            yield
        finally:
            self._write(now)

    def _write(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._buffers, values, strict=True):
                # through .data: autograd may have saved the buffer, and would take a new version for a change
                buffer.data.copy_(value)
