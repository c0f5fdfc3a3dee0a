"""The exact record of every attempted step, ``steps.bin``: loss, gradient norm and what became of the step.

The loggers' metrics are means of several steps; whether two runs are bit-identical, and where they part, needs each
step. A record has 17 bytes, little-endian: loss and gradient norm as float64, then a byte of `Flag`. The record of step
``i`` is at byte ``17 * i``, so a run that is resumed overwrites the steps that it makes again.
"""

from __future__ import annotations

import struct
import time
from enum import IntFlag
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from stabletrain.core.outcome import Outcome
from stabletrain.runtime.records.regular_file import only_regular

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_RECORD = struct.Struct("<ddB")
RECORD_BYTES = _RECORD.size
"""Bytes of the record of one step."""
_PAUSE = 0.01
"""Seconds between two writes: some file systems take as long for 17 bytes as for many more."""
_FIELDS = [("loss", "<f8"), ("grad_norm", "<f8"), ("flags", "u1")]


class Flag(IntFlag):
    """What became of a step."""

    RECORDED = 1
    """Set in every record: where it is not, the file has a hole."""
    SKIPPED = 2
    """Dropped by a rule, or because there was no loss."""
    OVERFLOW = 4
    """Dropped by the fp16 loss scaler."""
    CLIPPED = 8
    """Applied with a gradient that a transform or a bound had made smaller."""
    NO_LOSS = 16
    """``training_step`` gave no loss."""


_RECORDED, _SKIPPED, _OVERFLOW, _CLIPPED, _NO_LOSS = (flag.value for flag in Flag)  # at every step: as plain numbers


class Steps(NamedTuple):
    """The recorded steps in order; arrays of equal length.

    Args:
        step: number of the attempted step, int64; gaps where none was recorded.
        loss: float64, in the module's unit; NaN for a step without a loss.
        grad_norm: float64, global L2 norm before any clipping.
        flags: uint8, of `Flag`.
    """

    step: NDArray[np.int64]
    loss: NDArray[np.float64]
    grad_norm: NDArray[np.float64]
    flags: NDArray[np.uint8]


def flags_of(outcome: Outcome) -> int:
    """Return the flags of a step.

    >>> flags_of(Outcome(7, loss=2.0, grad_norm=3.0, transformed_norm=3.0, applied_norm=1.0))
    9
    """
    flags = _RECORDED
    if outcome.skipped:
        flags |= _SKIPPED
    if outcome.overflow:
        flags |= _OVERFLOW
    if outcome.clipped:
        flags |= _CLIPPED
    if outcome.no_loss:
        flags |= _NO_LOSS
    return flags


class StepsFile:
    """Writes the record. A step is in the file at most 10 ms after its `append`, or with the next one.

    The records wait in a buffer of this object, so that a process that is forked from this one never writes them.

    Args:
        path: the file; made if missing, else its records are kept until they are overwritten.

    Raises:
        OSError: if it cannot be opened, or is no regular file.
    """

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = open(path, "r+b", buffering=0, opener=only_regular)  # noqa: SIM115  (closed by `close`)
        self._waiting = bytearray()
        self._first = 0
        """The step of the first record that waits."""
        self._next = 0
        self._write_at = 0.0

    def append(self, step: int, loss: float, grad_norm: float, flags: int) -> None:
        """Write the record of a step.

        Args:
            step: number of the attempted step, >= 0.
            loss: in the module's unit.
            grad_norm: L2.
            flags: see `flags_of`.

        Raises:
            OSError: if the disk is full.
        """
        if step != self._next:
            self.flush()
            self._first = step
        self._waiting += _RECORD.pack(loss, grad_norm, flags)
        self._next = step + 1
        now = time.monotonic()
        if now >= self._write_at:
            self._write_at = now + _PAUSE
            self.flush()

    @property
    def waits(self) -> bool:
        """Whether a record is not in the file yet."""
        return bool(self._waiting)

    def cut(self, step: int) -> None:
        """Remove the records from a step on: a resumed run that ends earlier must not keep the end of the other.

        Args:
            step: the first one to remove, >= 0.
        """
        self.flush()
        if step * _RECORD.size < self._file.seek(0, 2):
            self._file.truncate(step * _RECORD.size)

    def flush(self) -> None:
        """Hand what was written to the operating system: it then survives the death of this process.

        Raises:
            OSError: if the disk is full; the records still wait.
        """
        if self._waiting:
            self._file.seek(self._first * _RECORD.size)
            left = memoryview(bytes(self._waiting))
            while left:
                left = left[self._file.write(left) :]
            self._waiting.clear()
        self._first = self._next

    def close(self) -> None:
        """Write the rest and close the file; a second call does nothing."""
        try:
            if not self._file.closed:
                self.flush()
        finally:
            self._file.close()


def read_steps(path: Path) -> Steps:
    """Return the steps that a file records, without holes and without half a record at its end.

    Args:
        path: of a ``steps.bin`` that anybody may have written.

    Raises:
        OSError: if it cannot be read, or is no regular file.
    """
    import numpy as np

    with open(path, "rb", opener=only_regular) as file:
        content = file.read()
    records = np.frombuffer(content[: len(content) // _RECORD.size * _RECORD.size], dtype=np.dtype(_FIELDS))
    step = np.flatnonzero(records["flags"] & Flag.RECORDED.value)
    found = records[step]
    return Steps(step, *(np.ascontiguousarray(found[name]) for name, _ in _FIELDS))
