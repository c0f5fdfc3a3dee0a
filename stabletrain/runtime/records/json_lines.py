"""A file of JSON lines that a full disk does not end: what it refuses waits until it takes it."""

from __future__ import annotations

import logging
import os
from collections import deque
from pathlib import Path

logger = logging.getLogger("stabletrain")

_MOST = 10_000
"""Lines that wait; beyond it the oldest are lost."""


class JsonLines:
    """Appends whole lines; the file appears with the first one.

    Args:
        path: None: write nothing (as on ranks other than 0).
        what: the lines are, for the message.
    """

    def __init__(self, path: Path | None, what: str) -> None:
        self.path, self._what = path, what
        self._waiting: deque[str] = deque(maxlen=_MOST)

    def append(self, line: str) -> None:
        """Write a line, and before it those that wait. A disk that refuses is reported once each time it begins to."""
        if self.path is None:
            return
        told = bool(self._waiting)
        self._waiting.append(line + "\n")
        try:
            self._write(self.path)
            self._waiting.clear()
        except OSError as error:
            if not told:
                logger.warning(
                    "%s cannot be written to %s: %s; they are kept in memory and written with the next that can",
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
                os.truncate(path, size)  # half a line would spoil the file
            raise
