"""The attempts of a run. A run whose process died goes on in a new attempt: one folder, one run in MLflow.

``attempts.jsonl`` in the run's folder has one line for each attempt that has ended, written by whoever starts the
attempts: the launcher, or a batch script. The number of the attempt that runs is in the environment variable
`ATTEMPT_ENV` of its processes.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stabletrain.config.resume import checkpoint_of_run, verified_in
from stabletrain.launch.bounded import is_count, one_message
from stabletrain.launch.result import EXIT_CODES, End
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.manifest import NAME as MANIFEST
from stabletrain.runtime.checkpoints.manifest import Manifest
from stabletrain.runtime.records.json_lines import append_lines, read_lines
from stabletrain.runtime.records.recipe import recipe_hash
from stabletrain.runtime.records.run_files import ATTEMPTS, EVENTS, INTERVENTIONS, RUN_YAML

ATTEMPT_ENV = "STABLETRAIN_ATTEMPT"
"""Environment variable of a run's processes: the number of their attempt, from 1."""

_MOST_RANKS = 1_000
_MOST_LINES = 10_000
"""Of a file that may come from anywhere."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt that has ended.

    Args:
        attempt: its number, from 1.
        start: when its processes were started, ISO 8601 in UTC.
        ready: when all of them had imported and built the run; None: they had not.
        first_step: when its first batch was done; None: none was.
        end: when it ended.
        cause: how it ended.
        message: how it ended, for the user.
        ranks: those that ended it; empty if that is not known.
        host: of the first of them; empty if that is not known.
        step: attempted steps when it ended.
        from_step: attempted steps in the checkpoint that it went on from, 0 for new weights; None: it made no step.
        steps_lost: steps of the attempt before that it had to make again.
        seconds_lost: from the last step of the attempt before to its own first one.
    """

    attempt: int
    start: str
    ready: str | None = None
    first_step: str | None = None
    end: str
    cause: End
    message: str = ""
    ranks: tuple[int, ...] = ()
    host: str = ""
    step: int = 0
    from_step: int | None = None
    steps_lost: int = 0
    seconds_lost: float = 0.0


def this_attempt(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of the attempt to which this process belongs, from 1.

    Args:
        environment: to read.
    """
    text = environment.get(ATTEMPT_ENV, "")
    return max(1, int(text)) if text.isdecimal() and len(text) < 10 else 1


def append_attempt(folder: Path, attempt: Attempt) -> None:
    """Add a line to ``attempts.jsonl``.

    Args:
        folder: the run's folder.
        attempt: that has ended.

    Raises:
        OSError: if it cannot be written.
    """
    append_lines(folder / ATTEMPTS, json.dumps(asdict(attempt)) + "\n")


def read_attempts(folder: Path) -> list[Attempt]:
    """Return the attempts of a run that have ended, in order; lines with other content are left out.

    Args:
        folder: the run's folder, which may come from anywhere.
    """
    return read_attempts_file(folder / ATTEMPTS)


def read_attempts_file(path: Path) -> list[Attempt]:
    """As `read_attempts`, from a copy of the file.

    Args:
        path: of the file.
    """
    found: list[Attempt] = []
    with suppress(OSError):
        for line in itertools.islice(read_lines(path), _MOST_LINES):
            if line.record is not None and (attempt := _parse(line.record)) is not None:
                found.append(attempt)
    return found


def resume_of_attempt(config: Mapping[str, Any]) -> str | None:
    """Return where a further attempt goes on: the run's own checkpoints, or, before there is one, as the first began.

    Args:
        config: the content of run.yaml.

    Returns:
        A value of the config key ``resume``. For a folder of checkpoints, the newest undamaged one is read.
    """
    own = _own_checkpoints(config)
    resume: str | None = str(own) if own is not None else config.get("resume")
    return resume


def _own_checkpoints(config: Mapping[str, Any]) -> Path | None:
    """The run's own checkpoints; None before there is one.

    In a folder that was given, those of other runs may lie: the newest one there must be of this recipe, and have been
    written after this run.yaml.
    """
    folder = Path(config["run_dir"])
    plugins = config.get("plugins")
    node = plugins.get("checkpoints") if isinstance(plugins, Mapping) else None
    given = node.get("folder") if isinstance(node, Mapping) else None
    if not isinstance(given, str):
        return checkpoint_of_run(folder)
    place, found = Path(given).expanduser().absolute(), []
    for each in verified_in(place):
        with suppress(CheckpointError, OSError):
            found.append((Manifest.read(each), (each / MANIFEST).stat().st_mtime))
    newest, written = max(found, key=lambda each: each[0].sequence, default=(None, 0.0))
    with suppress(OSError):
        begun = (folder / RUN_YAML).stat().st_mtime
        if newest is not None and written >= begun and newest.info.recipe == recipe_hash(folder, but=("chaos",)):
            return place
    return checkpoint_of_run(folder)


def goes_on_itself(config: Mapping[str, Any]) -> bool:
    """Return whether a config resumes from its own run's checkpoints, as a further attempt does.

    Args:
        config: of an attempt, from `resume_of_attempt`.
    """
    resume = config.get("resume")
    if not isinstance(resume, str):
        return False
    # in both ways: the folder of checkpoints may be a link to another disk
    ways = (os.path.realpath, os.path.abspath)
    if any(way(resume).startswith(way(config["run_dir"]) + os.sep) for way in ways):
        return True
    return this_attempt() > 1 and resume == str(_own_checkpoints(config))  # last, as it reads every manifest


def forget_records(folder: Path) -> None:
    """Remove what an earlier attempt recorded, if the next one begins as the first did: there is no checkpoint yet.

    ``steps.bin`` is cut by the attempt itself.

    Args:
        folder: the run's folder.
    """
    for name in (EVENTS, INTERVENTIONS):
        with suppress(OSError):
            (folder / name).unlink()


def iso(time_ns: int) -> str:
    """Return a time as text.

    Args:
        time_ns: nanoseconds since 1970.

    >>> iso(1_700_000_000_250_000_000)
    '2023-11-14T22:13:20.250+00:00'
    """
    return datetime.fromtimestamp(time_ns / 1e9, UTC).isoformat(timespec="milliseconds")


def seconds_of(text: str) -> float:
    """Return a time from `iso` in seconds since 1970; 0 for another text.

    Args:
        text: ISO 8601.
    """
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return 0.0


def _parse(record: Mapping[str, Any]) -> Attempt | None:
    given = {field.name: record[field.name] for field in fields(Attempt) if field.name in record}
    ranks, seconds, cause = given.get("ranks", []), given.get("seconds_lost", 0.0), given.get("cause")
    from_step = given.get("from_step")
    counts = ("attempt", "step", "steps_lost")
    texts = ("start", "end", "message", "host")
    fits = (
        all(is_count(given.get(name, 0)) for name in counts)
        and all(isinstance(given.get(name, ""), str) for name in texts)
        and {"attempt", "start", "end", "cause"} <= given.keys()
        and isinstance(cause, str)
        and cause in EXIT_CODES
        and all(isinstance(given.get(name), str | None) for name in ("ready", "first_step"))
        and (from_step is None or is_count(from_step))
        and isinstance(ranks, list)
        and all(map(is_count, ranks))
        and isinstance(seconds, int | float)
        and 0 <= seconds < 1e12
    )
    if not fits:
        return None
    given |= {name: one_message(given[name]) for name in texts if name in given}
    return Attempt(**{**given, "ranks": tuple(ranks[:_MOST_RANKS])})
