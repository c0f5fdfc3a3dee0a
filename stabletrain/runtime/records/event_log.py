"""The log of events: JSON lines on disk, the recent ones in memory, and for each bad step one line as a warning."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from pathlib import Path
from typing import NamedTuple

from stabletrain.core.events import Event, EventKind
from stabletrain.core.outcome import Outcome
from stabletrain.runtime.records.json_lines import JsonLines

logger = logging.getLogger("stabletrain")
END = logging.getLogger("stabletrain.end")
"""Logs the line at the end of a fit. The command line, which ends with a summary of its own, disables it."""

_ORDER: tuple[EventKind, ...] = (
    *("stop", "rollback", "accept", "announced", "replicas_differ", "divergence", "skip", "nonfinite", "overflow"),
    *("spike", "regime", "not_learning", "overfitting", "warning", "rewarm"),
)
"""The kinds of events in a line: what was done first, then what was found, the most severe first."""
_FOUND: frozenset[EventKind] = frozenset(
    ("replicas_differ", "divergence", "skip", "nonfinite", "overflow", "spike", "regime")
)
"""Kinds that describe a step and not an action that followed from it."""
_FULL = 64 << 20
"""Bytes of events in the file after which not every event of these kinds is written any more."""
_WORDS: dict[EventKind, str] = {
    "nonfinite": "non-finite",
    "regime": "new level",
    "not_learning": "not learning",
    "announced": "change",
    "rewarm": "second warm-up",
    "replicas_differ": "replicas differ",
}
"""Words for kinds that are no words."""


class _Due(NamedTuple):
    event: Event
    nth: int


class EventLog:
    """Records the events of one fit; the file is created with the first one.

    A run in which something is found at every step would fill a disk: after 64 MiB, of spikes, skips, non-finite steps
    and the like only the 1st, 2nd, 4th, 8th ... of each plugin and kind is written. What was done, such as a rollback,
    always is.

    Args:
        path: file to append JSON lines to; None: memory only (as on ranks other than 0).
        log_warnings: log events as warnings, all of one step as one line: of each plugin and kind the 1st, 2nd, 4th,
            8th ... so that many events of one kind do not hide the others.
    """

    def __init__(self, path: Path | None, log_warnings: bool = True) -> None:
        self.path = path
        self._file = JsonLines(path, "events")
        self.recent: deque[Event] = deque(maxlen=10_000)
        self.counts: Counter[tuple[str, str]] = Counter()
        self._log_warnings = log_warnings
        self._due: list[_Due] = []
        self._written = 0
        self._outcome: Outcome | None = None

    def append(self, event: Event) -> None:
        """Record an event; what is to be said of it is said by `show`, or before the event of another step."""
        self.recent.append(event._replace(samples=(), more_samples=0))  # thousands of lists of samples are too large
        key = (event.plugin, event.kind)
        self.counts[key] += 1
        count = self.counts[key]
        if self._due and self._due[0].event.step != event.step:
            self.show()
        if self._log_warnings and count & (count - 1) == 0:
            self._due.append(_Due(event, count))
        if self._written >= _FULL and event.kind in _FOUND and count & (count - 1):
            return
        line = event.to_json()
        self._file.append(line)
        if self._written < _FULL <= self._written + len(line):
            logger.warning(
                "%s holds %d MiB of events of this run: from now on, of what is found only the 1st, 2nd, 4th, 8th ... "
                "of each plugin and kind is written",
                self.path,
                _FULL >> 20,
            )
        self._written += len(line)

    def conclude(self, outcome: Outcome) -> None:
        """Say in the line of this step what became of it."""
        self._outcome = outcome

    def show(self) -> None:
        """Log the line of the last step with an event, unless that was done before."""
        due, self._due = self._due, []
        if due:
            outcome = self._outcome
            logger.warning(_line(due, outcome if outcome is not None and outcome.step == due[0].event.step else None))


def _line(due: list[_Due], outcome: Outcome | None) -> str:
    """All that is to be said of one step."""
    due = sorted(due, key=lambda each: _ORDER.index(each.event.kind))
    parts: list[str] = []
    values: set[str] = set()
    kind: EventKind | None = None
    for event, _ in due:
        said, value = event.reason.partition(" (")[0], f"{event.value:.6g}"
        if event.kind in _FOUND:
            if value in values or any(said in part for part in parts):
                continue  # another plugin has found the same, or it is the reason of what was done
            values.add(value)
        label = "" if event.kind == kind else f"{_WORDS.get(event.kind, event.kind)}: "
        kind = event.kind
        parts.append(f"{label}{event.reason}")
    if outcome is not None and all(each.event.kind in _FOUND for each in due):
        parts += _ending(outcome, " ".join(parts))
    first = due[0]
    times = "" if first.nth == 1 else f" (number {first.nth} of its kind)"
    return f"step {first.event.step}: {'; '.join(parts)}{times}"


def _ending(outcome: Outcome, text: str) -> list[str]:
    """What became of a step with an event, unless its reason says it."""
    if outcome.applied:
        clipped = outcome.clipped and math.isfinite(outcome.applied_norm)
        to = f", clipped to {outcome.applied_norm:.4g}" if clipped else ""
        return [] if " applied" in text else [f"the step was applied{to}"]
    return ["the step was skipped"] if outcome.skipped and "skipped" not in text else []


def say_end(summary: str, warning: str | None) -> None:
    """Log the line at the end of a fit, also where the level of logging is the default.

    Args:
        summary: what became of the steps.
        warning: what else there is to say; None: nothing.
    """
    is_told = not END.disabled and (logger.level == logging.NOTSET or logger.isEnabledFor(logging.INFO))
    if is_told and warning is None:
        END.handle(END.makeRecord(END.name, logging.INFO, __file__, 0, summary, (), None))
    elif warning is not None:
        logger.warning("%s. %s", summary, warning) if is_told else logger.warning(warning)
