"""Writes and reads ``interventions.jsonl``, from which a replay makes the same interventions again.

One JSON object per line: ``"action": "rollback"`` is an `Intervention`, ``"action": "accept"`` an `AcceptedLevel`.
``"action": "resume"`` records the step at which the run was resumed: earlier lines with later steps describe steps that
the resume discarded. With step -1 it discards all, and the interventions of the checkpoint follow: a resume writes it
where the log was damaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError
from stabletrain.runtime.records import run_files
from stabletrain.runtime.records.event_log import logger
from stabletrain.runtime.records.json_lines import JsonLines, Line, read_lines
from stabletrain_plugins.rollback.intervention import AcceptedLevel, Intervention
from stabletrain_plugins.rollback.intervention_record import Fingerprint, Resume, fingerprint_of, parse

_KEY = "config key plugins.spike.replay"

_STEP = re.compile(r'"step": (\d+),')


class InterventionLog:
    """Appends to the log of a run; the file is created with the first intervention.

    Args:
        path: of the file; None: write nothing, as on ranks other than 0.
        fingerprint: of the run.
    """

    def __init__(self, path: Path | None, fingerprint: Fingerprint) -> None:
        self._file = JsonLines(path, "interventions")
        self._fingerprint = fingerprint

    def append(self, made: Intervention | AcceptedLevel) -> None:
        """Write a rollback or an accepted level."""
        action = "accept" if isinstance(made, AcceptedLevel) else "rollback"
        self._write({"action": action, **made._asdict(), **self._fingerprint._asdict()})

    def record_resume(self, step: int, earlier: Iterable[Intervention | AcceptedLevel] | None = None) -> None:
        """Record that the run was resumed from a checkpoint.

        Args:
            step: attempted steps in the checkpoint.
            earlier: all interventions in the checkpoint; None: unknown. If the log does not exist yet, as in a new
                folder, or is damaged, it starts with them, so that a replay needs this log alone.
        """
        path = self._file.path
        if path is None:
            return
        exists = path.exists()
        if exists and (earlier is None or not _is_damaged(path)):
            self._write({"action": "resume", "step": step})
            return
        if exists:
            self._write({"action": "resume", "step": -1})
        for each in sorted(earlier or (), key=lambda made: made.step):  # `read` takes an earlier step for a restart
            self.append(each)

    def _write(self, record: dict[str, Any]) -> None:
        self._file.append(json.dumps(record))


def read(path: str | Path, fingerprint: Fingerprint) -> list[Intervention | AcceptedLevel]:
    """The rollbacks and accepted levels of a log, in the order of their steps, without those that a restart discarded.

    A damaged line is ignored, with a warning, where it cannot matter: as the last line, which was cut when the process
    was killed, and where the run was resumed from before it.

    Args:
        path: of the log, or of a run's folder.
        fingerprint: of the run that is to repeat them.

    Raises:
        UserError: if the log cannot be read, belongs to another run, or is damaged where it matters.
    """
    path = Path(path).expanduser()
    file = path / run_files.INTERVENTIONS if path.is_dir() else path
    try:
        lines = list(read_lines(file))
    except OSError as error:
        raise UserError(
            f"rollback: replay={str(path)!r} cannot be read: {error.strerror}; expected the {run_files.INTERVENTIONS} "
            f"of a run that rolled back, or that run's folder ({_KEY})"
        ) from None
    found: list[Intervention | AcceptedLevel] = []
    damaged: dict[int, int | None] = {}  # lines and, where it can be read, the step of each
    ignored: list[int] = []
    after_cut = False
    for line in lines:
        entry = parse(line)
        if entry is None:
            step = _STEP.search(line.text)
            damaged[line.number] = int(step[1]) if step else None
        else:
            last = entry.step if isinstance(entry, Resume) else entry.step - 1
            found = [each for each in found if each.step <= last]
            if isinstance(entry, Resume):
                # a line that was cut by a kill, or that describes a later step, is of the part that is discarded
                newest = max(damaged, default=0) if after_cut else 0
                gone = [n for n, at in damaged.items() if last < 0 or n == newest or (at is not None and at > last)]
                ignored += gone
                damaged = {n: at for n, at in damaged.items() if n not in gone}
            else:
                _require_same(fingerprint_of(line), fingerprint, file)
                found.append(entry)
        after_cut = line.record is None
    if after_cut and any(parse(line) is not None for line in lines):
        ignored.append(lines[-1].number)
        damaged.pop(lines[-1].number)
    if damaged:
        raise _error(file, lines, min(damaged))
    if ignored:
        logger.warning(
            "rollback: %s has incomplete or damaged lines, which are ignored since they describe steps that were "
            "discarded when the process was killed: %s",
            file,
            ", ".join(f"line {number}" for number in sorted(ignored)),
        )
    return found


def _is_damaged(path: Path) -> bool:
    try:
        return any(parse(line) is None for line in read_lines(path))
    except OSError:
        return False  # then it cannot be written either, which is said there


def _error(file: Path, lines: Sequence[Line], number: int) -> UserError:
    if all(parse(line) is None for line in lines):
        return UserError(
            f"rollback: line {number} of {file} is no intervention; expected an {run_files.INTERVENTIONS} ({_KEY})"
        )
    return UserError(
        f"rollback: line {number} of {file} is damaged, and no later line says that what it recorded was discarded: "
        "without it another training would be repeated. Repair the line, or replay the log of another run, or train "
        f"without a replay ({_KEY}=null)"
    )


def _require_same(theirs: Fingerprint, mine: Fingerprint, file: Path) -> None:
    if theirs == mine:
        return
    descriptions = {
        "model": "another model or optimizer",
        "recipe": "another recipe (seed, data, optimizer, schedule, plugins, chaos, precision or trainer differ)",
        "processes": f"{theirs.processes} processes, and this one has {mine.processes}",
    }
    different = [descriptions[name] for name in Fingerprint._fields if getattr(theirs, name) != getattr(mine, name)]
    raise UserError(
        f"rollback: {file} is the log of a run with {'; '.join(different)}: it cannot be replayed here. Replay it with "
        "its own recipe, or train without a replay (config key plugins.spike.replay=null)"
    )
