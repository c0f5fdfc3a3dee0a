"""What the threads that write a checkpoint tell each other, beside the collectives of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from stabletrain.runtime.checkpoints.errors import CheckpointError

T = TypeVar("T")

_TIMEOUT = timedelta(minutes=15)
"""For the slowest process to write its file."""


class WriterGroup:
    """Collectives of the writing threads, on a process group of their own. Making one is a collective.

    Args:
        timeout: after which a process that does not answer counts as lost.
    """

    def __init__(self, timeout: timedelta = _TIMEOUT) -> None:
        is_distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if is_distributed else 0
        self.size = dist.get_world_size() if is_distributed else 1
        self._timeout = timeout
        self._group: Any = None
        self.open()

    def open(self) -> None:
        """Make the process group, if it was given back. A collective."""
        if self._group is None and self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def share(self, value: T) -> T:
        """Rank 0's value.

        Raises:
            CheckpointError: if a rank is lost.
        """
        if self._group is None:
            return value
        box = [value]
        with _naming_lost():
            dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank.

        Raises:
            CheckpointError: if a rank is lost.
        """
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _naming_lost():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def send(self, tensor: Tensor, to: int) -> Any:
        """Begin to send a tensor on the CPU to a rank, which calls `receive` for it; see `finish`.

        Raises:
            CheckpointError: if that rank is lost.
        """
        with _naming_lost():
            return dist.isend(tensor, to, group=self._group)

    def receive(self, tensor: Tensor, source: int) -> Any:
        """Begin to receive into a tensor on the CPU what a rank sends; see `finish`.

        Raises:
            CheckpointError: if that rank is lost.
        """
        with _naming_lost():
            return dist.irecv(tensor, source, group=self._group)

    def finish(self, work: Iterable[Any]) -> None:
        """Wait until all that was begun is sent and received.

        Args:
            work: what `send` and `receive` returned.

        Raises:
            CheckpointError: if a rank is lost.
        """
        with _naming_lost():
            for each in work:
                each.wait()

    def close(self) -> None:
        """Give the process group back, when no rank uses it any more."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None


@contextlib.contextmanager
def _naming_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"another rank has ended, or does not answer ({first})") from error
