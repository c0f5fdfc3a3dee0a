"""Snapshot buffers in files instead of main memory: the kernel writes them to disk and reclaims their memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from stabletrain.errors import UserError
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers, bytes_of

_IN_MEMORY = 1 << 20
"""Tensors below this size, bytes, stay in memory: a file for each would cost more than it saves."""


class DiskBuffers(SnapshotBuffers):
    """Buffers for one snapshot in unlinked files of a folder: the kernel deletes them when the process ends.

    Args:
        folder: on a local disk with space for the snapshot; made if missing.
        owner: name of the plugin that takes the snapshots; errors begin with it.
        remedy: what the user can do when the folder cannot hold them; errors end with it.

    Raises:
        UserError: from `prepare` and `copy_in`, if the folder cannot be written or the disk is full.
    """

    page_locked = False

    def __init__(self, folder: Path, owner: str = "snapshots", remedy: str = "give another folder") -> None:
        super().__init__("host")
        self._folder = folder
        self._owner, self._remedy = owner, remedy

    def _allocate(self, source: Tensor) -> Tensor:
        size = bytes_of([source])
        if size < _IN_MEMORY:
            return super()._allocate(source)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".snapshot-", dir=self._folder)
            try:
                os.posix_fallocate(handle, 0, size)  # on a full disk, writing to blocks not allocated kills the process
                memory = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            finally:
                os.close(handle)
                os.unlink(name)
        except OSError as error:
            raise UserError(
                f"{self._owner}: a snapshot cannot be stored in {self._folder}: {error.strerror} "
                f"({size / 2**20:.0f} MiB needed); {self._remedy}"
            ) from error
        return memory.view(source.dtype).view(source.shape)
