"""Snapshot buffers in files instead of main memory: the kernel writes them to disk, and takes the memory back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from stabletrain.errors import UserError
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers, bytes_of

_IN_MEMORY = 1 << 20
"""Smaller tensors stay in memory, bytes: a file for each would cost more than it spares."""


class DiskBuffers(SnapshotBuffers):
    """Buffers for one snapshot that lie in a folder, in files without a name: nothing is left when the process ends.

    Args:
        folder: on a local disk with room for the snapshot; made if missing.
        owner: who keeps the snapshots, for error messages.
        remedy: what the user can do if the disk has no room, for error messages.

    Raises:
        UserError: from `prepare` and `copy_in`, if the disk has no room.
    """

    def __init__(self, folder: Path, owner: str = "snapshots", remedy: str = "give another folder") -> None:
        super().__init__("host")
        self._folder, self._owner, self._remedy = folder, owner, remedy

    def _touched(self, source: Tensor) -> Tensor:
        size = bytes_of([source])
        if size < _IN_MEMORY:
            return super()._touched(source)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".snapshot-", dir=self._folder)
            try:
                os.posix_fallocate(handle, 0, size)  # without its blocks, a full disk would be a crash at the copy
                memory = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            finally:
                os.close(handle)
                os.unlink(name)
        except OSError as error:
            raise UserError(
                f"{self._owner}: a snapshot cannot be kept in {self._folder}: {error.strerror} ({size / 2**20:.0f} MiB "
                f"wanted); {self._remedy}"
            ) from error
        return memory.view(source.dtype).view(source.shape)
