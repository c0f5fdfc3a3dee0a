"""Results of trials, and their row in the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kill_suite.moments import writing
from stabletrain.runtime.checkpoints import CheckpointError, Store, newest, verify

HEADER = (
    "| training | trials | kills | during a write | resumed from a checkpoint | restarted from step 0 "
    "| bit-identical at the end | unreadable `last` |\n|---|---|---|---|---|---|---|---|"
)


@dataclass
class Result:
    """The result of one trial.

    Args:
        during_write: number of kills during a write, which left an incomplete folder.
        resumed: number of kills after which a complete checkpoint existed.
        restarted: number of kills before the first checkpoint was complete.
        unreadable: number of kills after which a checkpoint under its final name could not be read.
        survivors: number of ranks that were not killed.
        ended_themselves: how many of these ended without being killed.
        different: differences from the training that was not killed.
        log: messages, in order.
    """

    during_write: int = 0
    resumed: int = 0
    restarted: int = 0
    unreadable: int = 0
    survivors: int = 0
    ended_themselves: int = 0
    different: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def check(self, checkpoints: Path, left_before: set[str]) -> Path | None:
        """After a kill: verify every checkpoint under its final name, and return the one to resume from.

        Args:
            checkpoints: their folder.
            left_before: names of the incomplete folders that earlier kills have left.
        """
        if writing(checkpoints) - left_before:
            self.during_write += 1
            self.log.append("killed during a write")
        found = newest(checkpoints)  # the same as SaveCheckpoints.last
        try:
            for entry in Store(checkpoints).entries():
                verify(entry.path)
            if found is not None:
                verify(found)
        except CheckpointError as error:
            self.unreadable += 1
            self.log.append(f"UNREADABLE: {error}")
        self.resumed += found is not None
        self.restarted += found is None
        self.log.append(f"resumed from {found.name}" if found else "restarted from step 0")
        return found


def row(training: str, results: Sequence[Result]) -> str:
    """Return one row of the table."""
    identical = sum(not each.different for each in results)
    kills = sum(each.resumed + each.restarted for each in results)
    cells = [
        training,
        len(results),
        kills,
        sum(each.during_write for each in results),
        sum(each.resumed for each in results),
        sum(each.restarted for each in results),
        f"{identical} of {len(results)}",
        sum(each.unreadable for each in results),
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def problems(results: Sequence[Result]) -> list[str]:
    """Return the failures of the benchmark; empty if there are none."""
    found = []
    if different := sum(bool(each.different) for each in results):
        found.append(f"{different} trials did not end bit-identical")
    if unreadable := sum(each.unreadable for each in results):
        found.append(f"{unreadable} kills left an unreadable checkpoint")
    if not any(each.during_write for each in results):
        found.append("no kill happened during a write, which the benchmark must cover")
    return found
