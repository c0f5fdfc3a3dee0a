"""The log of events: JSON lines on disk, the recent ones in memory, and warnings at a limited rate."""

from __future__ import annotations

import logging
from collections import Counter, deque
from pathlib import Path

from stabletrain.core.events import Event
from stabletrain.runtime.records.json_lines import JsonLines

logger = logging.getLogger("stabletrain")


class EventLog:
    """Records the events of one fit; the file is created with the first one.

    Args:
        path: file to append JSON lines to; None: memory only (as on ranks other than 0).
        log_warnings: log events as warnings: of each plugin and kind the 1st, 2nd, 4th, 8th ... so that many events of
            one kind do not hide the others.
    """

    def __init__(self, path: Path | None, log_warnings: bool = True) -> None:
        self._file = JsonLines(path, "events")
        self.recent: deque[Event] = deque(maxlen=10_000)
        self.counts: Counter[tuple[str, str]] = Counter()
        self._log_warnings = log_warnings

    def append(self, event: Event) -> None:
        """Record an event."""
        self.recent.append(event._replace(samples=(), more_samples=0))  # thousands of lists of samples are too large
        key = (event.plugin, event.kind)
        self.counts[key] += 1
        count = self.counts[key]
        if self._log_warnings and count & (count - 1) == 0:
            times = "" if count == 1 else f" (number {count} of its kind)"
            logger.warning("step %d: %s: %s%s", event.step, event.plugin, event.reason, times)
        self._file.append(event.to_json())
