"""What trials have shown, and the row of the table that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kill_suite.moments import writing
from stabletrain.runtime.checkpoints import CheckpointError, Store, newest, verify

HEADER = (
    "| training | trials | kills | during a write | resumed from a checkpoint | began anew "
    "| bit-identical at the end | unreadable `last` |\n|---|---|---|---|---|---|---|---|"
)


@dataclass
class Result:
    """What one trial has shown.

    Args:
        during_write: kills that hit a write: its folder never got its name.
        resumed: kills after which there was a checkpoint.
        anew: kills before the first one was complete.
        unreadable: kills after which a checkpoint that has its name could not be read.
        survivors: ranks that were not killed.
        ended_themselves: so many of these.
        different: what differs from the training that nobody killed.
        log: what happened, in words.
    """

    during_write: int = 0
    resumed: int = 0
    anew: int = 0
    unreadable: int = 0
    survivors: int = 0
    ended_themselves: int = 0
    different: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def look_at(self, checkpoints: Path, left_before: set[str]) -> Path | None:
        """After a kill: read every byte of what has a name, and find what a resume would begin with.

        Args:
            checkpoints: their folder.
            left_before: what an earlier kill has left of a write.
        """
        if writing(checkpoints) - left_before:
            self.during_write += 1
            self.log.append("within a write")
        found = newest(checkpoints)  # what SaveCheckpoints.last is
        try:
            for entry in Store(checkpoints).entries():
                verify(entry.path)
            if found is not None:
                verify(found)
        except CheckpointError as error:
            self.unreadable += 1
            self.log.append(f"UNREADABLE: {error}")
        self.resumed += found is not None
        self.anew += found is None
        self.log.append(f"on from {found.name}" if found else "anew")
        return found


def row(training: str, results: Sequence[Result]) -> str:
    """One line of the table."""
    identical = sum(not each.different for each in results)
    kills = sum(each.resumed + each.anew for each in results)
    cells = [
        training,
        len(results),
        kills,
        sum(each.during_write for each in results),
        sum(each.resumed for each in results),
        sum(each.anew for each in results),
        f"{identical} of {len(results)}",
        sum(each.unreadable for each in results),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def problems(results: Sequence[Result]) -> list[str]:
    """Why this is no proof; empty if it is one."""
    found = []
    if different := sum(bool(each.different) for each in results):
        found.append(f"{different} trials did not end bit-identical")
    if unreadable := sum(each.unreadable for each in results):
        found.append(f"{unreadable} kills left an unreadable checkpoint")
    if not any(each.during_write for each in results):
        found.append("no kill hit a write: the trials prove nothing")
    return found
