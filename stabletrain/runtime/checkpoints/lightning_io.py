"""The CheckpointIO with which ``ckpt_path=`` accepts folders of verified checkpoints, besides Lightning's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.loading import is_ours, load_good, read

Broadcast = Callable[[Any], Any]


class VerifiedIO(CheckpointIO):
    """Reads verified checkpoints, the same one on all ranks, and passes everything else to another CheckpointIO.

    Args:
        inner: reads and writes single files.
        broadcast: returns rank 0's object on all ranks.
        first: whether this is rank 0.
    """

    def __init__(self, inner: CheckpointIO, broadcast: Broadcast, first: bool) -> None:
        self.inner = inner
        self._broadcast = broadcast
        self._first = first

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; ``weights_only`` concerns single files, verified checkpoints hold only data.

        Raises:
            CheckpointError: on all ranks, if rank 0 finds no good one; on any rank that cannot read the one it found.
        """
        if not is_ours(path):
            return self.inner.load_checkpoint(path, map_location, weights_only)
        found, answer = None, ("", "")
        if self._first:
            try:
                found = load_good(path)
                answer = (str(found.path), "")
            except CheckpointError as error:
                answer = ("", str(error))
        chosen, problem = self._broadcast(answer)
        if problem:
            raise CheckpointError(problem)
        return (found or read(Path(chosen))).checkpoint

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a single file with the inner CheckpointIO."""
        self.inner.save_checkpoint(checkpoint, path, storage_options)

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a single file with the inner CheckpointIO."""
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Called by Lightning at the end of a run."""
        self.inner.teardown()
