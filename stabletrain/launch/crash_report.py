"""How each rank of a failed attempt ended, the first cause first, with the last lines of its log: ``crash-<n>.txt``."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stabletrain.launch.bounded import one_message
from stabletrain.launch.first_cause import ranks as named
from stabletrain.launch.first_cause import without_result
from stabletrain.launch.rank_ends import RankEnd
from stabletrain.runtime.records.regular_file import only_regular
from stabletrain.runtime.records.run_files import crash_report, rank_log

LINES = 20
"""Lines of each rank's log."""
_MOST_SHOWN = 8
"""Ranks that the terminal shows."""
_TAIL_BYTES = 65_536
_LONGEST_LINE = 1_000


@dataclass(frozen=True, kw_only=True)
class CrashReport:
    """The report of one attempt with several processes.

    Args:
        folder: the run's folder.
        attempt: its number.
        size: number of processes.
        message: how the attempt ended.
        blamed: the ranks that ended it; empty if nobody knows.
        ends: what the processes wrote.
        exits: exit codes that torchrun reported, by rank.
    """

    folder: Path
    attempt: int
    size: int
    message: str
    blamed: Sequence[int]
    ends: Sequence[RankEnd]
    exits: Mapping[int, int]

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.folder / crash_report(self.attempt)

    def write(self) -> None:
        """Write the whole report.

        Raises:
            OSError: if it cannot be written.
        """
        lines = [f"attempt {self.attempt}: {self.message}", "", *self._causes(self._order)]
        for rank in self._order:
            lines += ["", f"last lines of rank {rank}, {self._log(rank)}:", *self._last_lines(rank)]
        self.path.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def shown(self) -> str:
        """Return what the terminal shows: the causes, and the last lines of a rank that left no word of its own."""
        order = self._order
        lines = [f"crash report of attempt {self.attempt}:", *self._causes(order[:_MOST_SHOWN])]
        if len(order) > _MOST_SHOWN:
            lines.append(f"  and {len(order) - _MOST_SHOWN} more ranks")
        wrote = {end.rank for end in self.ends}
        silent = next((rank for rank in self.blamed if rank not in wrote), None)
        if silent is not None and (last := self._last_lines(silent)):
            lines += [f"  last lines of rank {silent}:", *(f"    {line}" for line in last)]
        lines.append(f"  with the last lines of every rank: {self.path}")
        return "\n".join(lines)

    @property
    def _order(self) -> list[int]:
        first = [rank for rank in self.blamed if 0 <= rank < self.size]
        return [*first, *(rank for rank in range(self.size) if rank not in first)]

    def _causes(self, order: Sequence[int]) -> Iterator[str]:
        for rank in order:
            word = "first cause" if rank in self.blamed else "consequence" if self.blamed else "end"
            yield f"  {word}: {self._end_of(rank)}"

    def _end_of(self, rank: int) -> str:
        end = next((each for each in self.ends if each.rank == rank), None)
        if end is not None:
            at = f" at {end.at}" if end.at else ""
            return f"rank {rank} on {end.host}{at}: {end.result.end}: {end.result.message}"
        if rank in self.exits:
            return f"{without_result(self.exits[rank], named([rank])).message}"
        return f"rank {rank} on {socket.gethostname() if len(self._hosts) < 2 else 'an unknown host'} wrote nothing"

    @property
    def _hosts(self) -> set[str]:
        return {end.host for end in self.ends}

    def _log(self, rank: int) -> str:
        return rank_log(self.attempt, rank)

    def _last_lines(self, rank: int) -> list[str]:
        return last_lines(self.folder / self._log(rank))


def last_lines(path: Path, count: int = LINES) -> list[str]:
    """Return the last lines of a log, each cut to a length that a terminal can show; none if it cannot be read.

    Args:
        path: of the file.
        count: number of lines.
    """
    with suppress(OSError), open(path, "rb", opener=only_regular) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read(_TAIL_BYTES).decode("utf-8", "replace")
        return [one_message(line, _LONGEST_LINE) for line in text.splitlines()[-count:]]
    return []
