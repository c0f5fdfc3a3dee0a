"""A file of JSON lines that survives a full disk: lines that cannot be written wait in memory."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path

logger = logging.getLogger("stabletrain")

_MAX_WAITING = 10_000
"""Maximum number of waiting lines; beyond it the oldest are lost."""


class JsonLines:
    """Appends whole lines; the file is created with the first one.

    Args:
        path: of the file; None: write nothing (as on ranks other than 0).
        what: name of the lines for the message, such as ``"events"``.
    """

    def __init__(self, path: Path | None, what: str) -> None:
        self.path, self._what = path, what
        self._waiting: deque[str] = deque(maxlen=_MAX_WAITING)

    def append(self, line: str) -> None:
        """Write the waiting lines and this one. Log a warning at the first failure after a success."""
        if self.path is None:
            return
        was_failing = bool(self._waiting)
        self._waiting.append(line + "\n")
        try:
            self._write(self.path)
            self._waiting.clear()
        except OSError as error:
            if not was_failing:
                logger.warning(
                    "%s cannot be written to %s: %s; they stay in memory until a later write succeeds",
                    self._what,
                    self.path,
                    error,
                )

    def _write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(self._waiting))
        except OSError:
            if path.exists():
                os.truncate(path, size)  # remove an incomplete line
            raise
