"""The record of events: JSON lines on disk, kept in memory too, and said aloud without flooding."""

from __future__ import annotations

import logging
from collections import Counter, deque
from pathlib import Path

from stabletrain.core.events import Event

logger = logging.getLogger("stabletrain")


class EventLog:
    """Collects events of one fit; the file appears with the first one.

    Args:
        path: where to append JSON lines; None keeps events in memory only (as on ranks other than 0).
        speak: log events as warnings: each plugin's first of a kind, then its 2nd, 4th, 8th ... so that a storm of
            events cannot bury the rest.
    """

    def __init__(self, path: Path | None, speak: bool = True) -> None:
        self.path = path
        self.recent: deque[Event] = deque(maxlen=10_000)
        self.counts: Counter[tuple[str, str]] = Counter()
        self._speak = speak

    def append(self, event: Event) -> None:
        """Record an event. A disk that refuses the line is reported once and does not end the run."""
        self.recent.append(event)
        key = (event.plugin, event.kind)
        self.counts[key] += 1
        count = self.counts[key]
        if self._speak and count & (count - 1) == 0:
            times = "" if count == 1 else f" (number {count} of its kind)"
            logger.warning("step %d: %s: %s%s", event.step, event.plugin, event.reason, times)
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(event.to_json() + "\n")
            except OSError as error:
                logger.warning("events are no longer written to %s: %s; they are kept in memory", self.path, error)
                self.path = None
