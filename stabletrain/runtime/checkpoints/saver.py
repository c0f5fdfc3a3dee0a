"""Save checkpoints while training continues: tensors are copied in memory, and a thread writes them to disk."""

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
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.manifest import CheckpointInfo
from stabletrain.runtime.checkpoints.store import Entry, Store
from stabletrain.runtime.snapshots.buffers import SnapshotBuffers

logger = logging.getLogger("stabletrain")

_NICENESS = 10


class Saver:
    """Writes the checkpoints of one run, at most one at a time.

    The writing thread is not a daemon: at its end the process waits for an unfinished write.

    Args:
        store: the folder of the checkpoints.
        background: copy the tensors and write the copy in a thread; False: training waits for every write.
        setting: name of the setting for the time between saves, for the warning that a write takes longer.
    """

    def __init__(self, store: Store, background: bool = True, setting: str = "the interval between saves") -> None:
        self.store = store
        self.newest: Path | None = None
        """The newest checkpoint that was written completely."""
        self._setting = setting
        self._waited = 0.0
        self._buffers = SnapshotBuffers() if background else None
        self._thread: threading.Thread | None = None
        self._warned_waiting = self._warned_omitted = False
        self._failures = 0  # writes that failed since one succeeded

    @property
    def nbytes(self) -> int:
        """Memory of the copy, bytes."""
        return 0 if self._buffers is None else self._buffers.nbytes

    @property
    def is_writing(self) -> bool:
        """Whether a write is not finished."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self, run: str) -> None:
        """Remove the incomplete folders of killed processes, and warn if the folder holds checkpoints of other runs.

        Args:
            run: identity of this run.
        """
        with contextlib.suppress(OSError):
            self.store.sweep()
        others = [each.path.name for each in self.store.entries() if each.manifest.info.run != run]
        if others:
            logger.warning(
                "%s holds checkpoints of another run (%s); they are not deleted, but resuming from this folder reads "
                "the newest checkpoint of any run: use a separate folder for each run",
                self.store.folder,
                ", ".join(others),
            )

    def prepare(self, checkpoint: Mapping[str, Any]) -> None:
        """Check early that such a checkpoint can be stored, and allocate the memory for its copy in the background.

        Args:
            checkpoint: its content, which is not written.

        Raises:
            CheckpointError: if it holds something that cannot be stored as data.
        """
        encoded = self._encode(checkpoint)
        self._warn_omitted(encoded)
        buffers = self._buffers
        if buffers is not None:
            self._start(lambda: buffers.prepare(encoded.tensors))

    def save(self, checkpoint: Mapping[str, Any], info: CheckpointInfo, wait: bool = False) -> None:
        """Save a checkpoint. If it cannot be written, a warning is logged and training continues.

        Of writes that fail one after the other, the 1st, 2nd, 4th, 8th ... is logged, and each that is waited for.

        Args:
            checkpoint: its content; may change again when this returns.
            info: its step, run and metric.
            wait: return when it is on the disk.

        Raises:
            CheckpointError: if it holds something that cannot be stored as data.
        """
        self._wait_for_previous()
        encoded = self._encode(checkpoint)
        self._warn_omitted(encoded)
        if wait or self._buffers is None:
            self._write(info, encoded, is_last=wait)
            return
        self._buffers.copy_in(encoded.tensors)
        encoded.tensors = self._buffers.tensors
        self._start(lambda: self._write(info, encoded))

    def wait(self) -> None:
        """Wait for an unfinished write."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait for an unfinished write; nothing is saved any more."""
        self.wait()

    def best(self, run: str) -> Entry | None:
        """The best checkpoint of a run by the store's metric; waits for an unfinished write."""
        self.wait()
        return self.store.best(e for e in self.store.entries() if e.manifest.info.run == run)

    def is_best(self, run: str, value: float) -> bool:
        """Whether a value of the store's metric is finite, and better than that of every checkpoint of a run."""
        best = self.best(run)
        known = None if best is None else best.manifest.info.value
        if known is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < known if self.store.retention.mode == "min" else value > known

    def _encode(self, checkpoint: Mapping[str, Any]) -> Any:
        """What this process writes, with the attributes ``omitted`` and ``tensors``; copies may replace the latter."""
        return Encoded(checkpoint)

    def _put(self, info: CheckpointInfo, encoded: Any) -> Path | None:
        """Write what `_encode` returned; the folder of the complete checkpoint, None if another process has it."""
        return self.store.write(info, encoded.tree, encoded.names, encoded.tensors)

    def _write(self, info: CheckpointInfo, encoded: Any, is_last: bool = False) -> None:
        try:
            self.newest = self._put(info, encoded) or self.newest
            self._failures = 0
        except (OSError, CheckpointError) as error:
            self._failures += 1
            if self._failures & (self._failures - 1) and not is_last:
                return
            good = "there is none yet" if self.newest is None else f"the newest complete one is {self.newest.name}"
            logger.warning(
                "the checkpoint of step %d could not be written to %s%s: %s; %s. Training continues, and the next "
                "checkpoint is written as planned",
                info.step,
                self.store.folder,
                "" if self._failures == 1 else f" (failure {self._failures} in a row)",
                getattr(error, "strerror", None) or error,
                good,
            )
        except Exception:
            logger.exception("the checkpoint of step %d could not be written; training continues", info.step)

    def _start(self, job: Callable[[], None]) -> None:
        self.wait()

        def run() -> None:
            _yield_to_training()
            job()

        self._thread = threading.Thread(target=run, name="stabletrain-checkpoint")
        self._thread.start()

    def _wait_for_previous(self) -> None:
        start = time.monotonic()
        self.wait()
        self._waited += time.monotonic() - start
        if self._waited > 1.0 and not self._warned_waiting:
            self._warned_waiting = True
            logger.warning(
                "training has waited %.1f s for checkpoints to be written: %s is shorter than a write, so increase it",
                self._waited,
                self._setting,
            )

    def _warn_omitted(self, encoded: Any) -> None:
        if encoded.omitted and not self._warned_omitted:
            self._warned_omitted = True
            logger.warning(
                "checkpoints hold only data, so these hyper-parameters are kept as the text of their repr: %s. "
                "Resuming takes them from the module; pass them to load_from_checkpoint",
                ", ".join(encoded.omitted),
            )


def _yield_to_training() -> None:
    """Lower this thread's priority, so that on a busy machine it waits for training; only Linux has one per thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
