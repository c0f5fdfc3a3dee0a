"""A run that continues another one begins with its record of steps and events."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stabletrain.launch.bounded import is_count, read_json
from stabletrain.runtime.records.json_lines import read_lines
from stabletrain.runtime.records.regular_file import only_regular
from stabletrain.runtime.records.run_files import EVENTS, RUN_YAML, STEPS
from stabletrain.runtime.records.steps_file import RECORD_BYTES


def take_over_steps(config: Mapping[str, Any], attempted: int) -> None:
    """Copy ``steps.bin`` of the run whose checkpoint is resumed, unless there is one in the run's folder.

    A file that cannot be copied is left out: the record then begins where the run resumes.

    Args:
        config: the content of run.yaml.
        attempted: steps that the checkpoint holds; later ones are made again, and are not copied.
    """
    target = Path(config["run_dir"]) / STEPS
    if target.exists():
        return
    with suppress(OSError):
        folder = resumed_folder(config)
        if folder is None or not stat.S_ISREG((folder / STEPS).lstat().st_mode):
            return  # a link in a folder from elsewhere may lead to any file of the user, and the copy is an artifact
        source, part = folder / STEPS, target.with_name(f"{STEPS}.part")
        with open(source, "rb", opener=only_regular) as earlier, open(part, "wb") as copy:
            copy.write(earlier.read(attempted * RECORD_BYTES))
        os.replace(part, target)


def take_over_events(earlier: Path, own: Path, attempted: int) -> None:
    """Begin a log of events with the earlier run's, up to the step at which it is resumed.

    Args:
        earlier: events.jsonl of the run whose checkpoint is resumed.
        own: events.jsonl of this run; what is in it stays, behind the others.
        attempted: steps that the checkpoint holds; events of later steps are of steps that are made again.

    Raises:
        OSError: if the file cannot be written; it is then unchanged.
    """
    if not earlier.exists() or not stat.S_ISREG(earlier.lstat().st_mode):
        return  # as of the steps: a link may lead to any file of the user
    _write_events(own, _events_before(earlier, attempted), own.read_text(encoding="utf-8") if own.exists() else "")


def cut_events(own: Path, attempted: int) -> None:
    """Remove the events of the steps that a further attempt of the same run makes again.

    Args:
        own: events.jsonl of the run.
        attempted: steps that the checkpoint holds.

    Raises:
        OSError: if the file cannot be written; it is then unchanged.
    """
    if own.exists() and stat.S_ISREG(own.lstat().st_mode):
        _write_events(own, _events_before(own, attempted))


def _events_before(path: Path, attempted: int) -> list[dict[str, Any]]:
    return [line.record for line in read_lines(path) if line.record and _step_of(line.record) < attempted]


def _write_events(path: Path, records: list[dict[str, Any]], more: str = "") -> None:
    part = path.with_name(f"{EVENTS}.part")
    with open(part, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
        file.write(more)
    os.replace(part, path)


def _step_of(record: Mapping[str, Any]) -> float:
    step = record.get("step")
    return step if isinstance(step, int) else math.inf


def read_resumes(path: Path) -> list[int]:
    """Return the numbers of attempted steps at which a run was resumed; empty if that is not recorded.

    Args:
        path: of ``resumes.json``, which anybody may have written.
    """
    with suppress(OSError, ValueError):
        content = read_json(path)
        if isinstance(content, list) and all(map(is_count, content)):
            return content
    return []


def resumed_folder(config: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run whose checkpoint is resumed; None if it is in no run's folder.

    Args:
        config: the content of run.yaml.
    """
    resume = config.get("resume")
    if not isinstance(resume, str):
        return None
    path = Path(resume).resolve()
    return next((each for each in (path, *path.parents) if (each / RUN_YAML).is_file()), None)
