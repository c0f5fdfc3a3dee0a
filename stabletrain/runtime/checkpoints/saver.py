"""Saving while training goes on: a snapshot in memory, which one thread at a time writes to the disk."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stabletrain.runtime.checkpoints.encoding import Encoded
from stabletrain.runtime.checkpoints.manifest import CheckpointInfo
from stabletrain.runtime.checkpoints.store import Entry, Store
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers

logger = logging.getLogger("stabletrain")

_NICENESS = 10


class Saver:
    """Writes the checkpoints of one run, at most one at a time.

    Its thread is not a daemon: a process that ends waits for the write in flight.

    Args:
        store: where they go.
        snapshots: copy the tensors and write behind training's back; False: training waits for every write.
    """

    def __init__(self, store: Store, snapshots: bool = True) -> None:
        self.store = store
        self.newest: Path | None = None
        """The newest checkpoint that is on the disk."""
        self._waited = 0.0
        self._told_waiting = False
        self._buffers = SnapshotBuffers() if snapshots else None
        self._thread: threading.Thread | None = None
        self._warned_omitted = False

    @property
    def nbytes(self) -> int:
        """Memory that the snapshot takes, bytes."""
        return 0 if self._buffers is None else self._buffers.nbytes

    def begin(self, run: str) -> None:
        """Clear away what killed processes have left half written, and say so if the folder is shared with other runs.

        Args:
            run: identity of this run.
        """
        with contextlib.suppress(OSError):
            self.store.sweep()
        others = [each.path.name for each in self.store.entries() if each.manifest.about.run != run]
        if others:
            logger.warning(
                "%s holds checkpoints of another run (%s); they are left alone, but it is resumed from the newest "
                "of all, whoever wrote it: give every run a folder of its own",
                self.store.folder,
                ", ".join(others),
            )

    def prepare(self, checkpoint: Mapping[str, Any]) -> None:
        """Find out early whether such a checkpoint can be stored, and get the memory for it in the background.

        Raises:
            CheckpointError: if it holds something that is no data.
        """
        packed = Encoded(checkpoint)
        self._warn_omitted(packed)
        buffers = self._buffers
        if buffers is not None:
            self._start(lambda: buffers.prepare(packed.tensors))

    def save(self, checkpoint: Mapping[str, Any], about: CheckpointInfo, wait: bool = False) -> None:
        """Save a checkpoint. A disk that refuses is reported, and ends nothing.

        Args:
            checkpoint: its content; may change again when this returns.
            about: what it says of itself.
            wait: return when it is on the disk.

        Raises:
            CheckpointError: if it holds something that is no data.
        """
        self._wait_for_previous()
        packed = Encoded(checkpoint)
        self._warn_omitted(packed)
        if wait or self._buffers is None:
            self._write(about, packed)
            return
        self._buffers.copy_in(packed.tensors)
        packed.tensors = self._buffers.tensors
        self._start(lambda: self._write(about, packed))

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def best(self, run: str) -> Entry | None:
        """The best checkpoint of a run by the store's metric, the one being written included."""
        self.wait()
        return self.store.best(e for e in self.store.entries() if e.manifest.about.run == run)

    def is_best(self, run: str, value: float) -> bool:
        """Whether a value of the store's metric is better than that of every checkpoint of a run; NaN never is."""
        best = self.best(run)
        known = None if best is None else best.manifest.about.value
        if known is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < known if self.store.keep.mode == "min" else value > known

    def _write(self, about: CheckpointInfo, packed: Encoded) -> None:
        try:
            self.newest = self.store.write(about, packed.tree, packed.names, packed.tensors)
        except OSError as error:
            good = "there is none yet" if self.newest is None else f"the newest good one is {self.newest.name}"
            logger.warning(
                "the checkpoint of step %d could not be written to %s: %s; %s, and the next one is tried as planned",
                about.step,
                self.store.folder,
                error.strerror or error,
                good,
            )
        except Exception:
            logger.exception("the checkpoint of step %d could not be written; training goes on", about.step)

    def _start(self, job: Callable[[], None]) -> None:
        self.wait()

        def run() -> None:
            _yield_to_training()
            job()

        self._thread = threading.Thread(target=run, name="stabletrain-checkpoint")
        self._thread.start()

    def _wait_for_previous(self) -> None:
        began = time.monotonic()
        self.wait()
        self._waited += time.monotonic() - began
        if self._waited > 1.0 and not self._told_waiting:
            self._told_waiting = True
            logger.warning(
                "training has waited %.1f s for checkpoints to be written: the interval (save_checkpoints.every) is "
                "shorter than a write",
                self._waited,
            )

    def _warn_omitted(self, packed: Encoded) -> None:
        if packed.omitted and not self._warned_omitted:
            self._warned_omitted = True
            logger.warning(
                "checkpoints are read as data and so leave out %s; resuming does not need them, load_from_checkpoint "
                "must be given them",
                ", ".join(packed.omitted),
            )


def _yield_to_training() -> None:
    """Where processor cores are short, the writer waits, not training; on Linux every thread has its own priority."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
