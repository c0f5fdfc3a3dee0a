"""``steps.bin`` of one fit: opened with the first step; a disk that fails does not end the training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabletrain.runtime.records.steps_file import StepsFile

logger = logging.getLogger("stabletrain")


def attempted_in(checkpoint: Mapping[str, Any]) -> int:
    """Return how many steps a run had attempted when it saved a checkpoint; 0 if it had no plugin, which counts them.

    Args:
        checkpoint: as Lightning loads it.
    """
    states = checkpoint.get("callbacks")
    states = states.values() if isinstance(states, Mapping) else ()
    counters = [each["counters"] for each in states if isinstance(each, Mapping) and "counters" in each]
    counts = [each.get("attempted") for each in counters if isinstance(each, Mapping)]
    return max((count for count in counts if isinstance(count, int)), default=0)


class StepsRecord:
    """Writes the steps of one fit; what cannot be written waits in memory, which is one warning.

    Args:
        path: of the file; its folder is made with the first step.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: StepsFile | None = None
        self._is_failing = False

    def begin(self, step: int) -> None:
        """Remove the records from a step on from a file that is there: of a process that had come further, say.

        Args:
            step: the first one that will be written.
        """
        if self.path.exists():
            try:
                self._open().cut(step)
            except OSError as error:
                self._warn(error)

    def append(self, step: int, loss: float, grad_norm: float, flags: int) -> None:
        """Write a step.

        Args:
            step: number of the attempted step, >= 0.
            loss: in the module's unit; NaN: there is none.
            grad_norm: L2; NaN: it was not measured.
            flags: of `stabletrain.runtime.records.steps_file.Flag`.
        """
        try:
            file = self._open()
            file.append(step, loss, grad_norm, flags)
            self._is_failing = self._is_failing and file.waits
        except OSError as error:
            self._warn(error)

    def flush(self) -> None:
        """Write what waits."""
        if self._file is not None:
            try:
                self._file.flush()
            except OSError as error:
                self._warn(error)

    def close(self) -> None:
        """Write what waits and close the file; a later step opens it again."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._warn(error)

    def _open(self) -> StepsFile:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = StepsFile(self.path)
        return self._file

    def _warn(self, error: OSError) -> None:
        if not self._is_failing:
            logger.warning("%s cannot be written: %s; training continues", self.path, error.strerror or error)
        self._is_failing = True
