"""How a run ended: the worker writes it to result.json, the launcher reads it."""

from __future__ import annotations

import json
import math
import os
import stat
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeGuard

from stabletrain.runtime.records.run_files import RESULT

End = Literal["finished", "failed", "stopped", "refused", "interrupted", "terminated", "killed"]

EXIT_CODES: dict[End, int] = {
    "finished": 0,
    "failed": 1,
    "killed": 1,
    "refused": 2,
    "stopped": 3,
    "interrupted": 130,
    "terminated": 143,
}

MLFLOW_STATUS: dict[End, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "refused": "FAILED",
    "stopped": "FAILED",
    "interrupted": "KILLED",
    "terminated": "KILLED",
    "killed": "KILLED",
}

MAX_MESSAGE = 2_000
"""Longest message of a result, in characters; a longer one is cut in its middle."""

_MAX_FILE = 4_000_000
_MAX_METRICS = 10_000
_MAX_NAME = 4_096


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of one run.

    Args:
        end: ``finished``; ``failed`` (an exception); ``stopped`` (by a plugin); ``refused`` (a `UserError` before the
            first step); ``interrupted`` (Ctrl-C); ``terminated`` (SIGTERM or SIGHUP); ``killed`` (the worker died
            without writing a result).
        message: one line for the user.
        steps: applied optimizer steps.
        seconds: duration of the worker.
        metrics: the last value of every logged metric.
        checkpoint: path of the checkpoint to resume from; None if there is none.
        threads: CPU threads that torch used.
    """

    end: End
    message: str = ""
    steps: int = 0
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    threads: int | None = None

    @property
    def exit_code(self) -> int:
        """Exit code of the command line."""
        return EXIT_CODES[self.end]

    def write(self, run_dir: Path) -> None:
        """Write result.json atomically: it is replaced as a whole.

        Args:
            run_dir: the run's folder.

        Raises:
            OSError: if it cannot be written; an earlier result.json is then unchanged.
        """
        write_json(run_dir / RESULT, asdict(self))


def read_result(run_dir: Path) -> Result | None:
    """Return the result in a run's folder; None if there is none, or its content is not a result.

    Args:
        run_dir: the run's folder.
    """
    try:
        return parse_result(read_json(run_dir / RESULT))
    except (OSError, ValueError):
        return None


def parse_result(content: object) -> Result:
    """Return the result that a JSON object describes; unknown keys are ignored.

    Args:
        content: from `read_json`.

    Raises:
        ValueError: if a field has another type, or a value that no run can have.
    """
    if not isinstance(content, Mapping):
        raise ValueError("expected an object")
    end = content.get("end")
    if not isinstance(end, str) or end not in EXIT_CODES:
        raise ValueError(f"end: expected one of {', '.join(EXIT_CODES)}, got {end!r}")
    message, checkpoint = content.get("message", ""), content.get("checkpoint")
    steps, seconds, threads = content.get("steps", 0), content.get("seconds", 0.0), content.get("threads")
    metrics = content.get("metrics", {})
    valid = {
        "message": isinstance(message, str),
        "steps": is_count(steps),
        "seconds": _is_number(seconds) and math.isfinite(seconds) and seconds >= 0,
        "metrics": isinstance(metrics, dict)
        and len(metrics) <= _MAX_METRICS
        and all(map(_is_number, metrics.values())),
        "checkpoint": checkpoint is None or (isinstance(checkpoint, str) and len(checkpoint) <= _MAX_NAME),
        "threads": threads is None or is_count(threads),
    }
    if wrong := [name for name, ok in valid.items() if not ok]:
        raise ValueError(f"{', '.join(wrong)}: not a value of a result")
    return Result(
        end=end,
        message=one_message(message),
        steps=steps,
        seconds=float(seconds),
        metrics={one_message(name): float(value) for name, value in metrics.items()},
        checkpoint=None if checkpoint is None else one_message(checkpoint, _MAX_NAME),
        threads=threads,
    )


def one_message(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return a text that any terminal can show: control characters and broken Unicode escaped, cut in the middle.

    Args:
        text: any text.
        limit: in characters.

    >>> one_message("a bell \\x07 and half a character \\udc80")
    'a bell \\\\x07 and half a character \\\\udc80'
    >>> one_message("0123456789" * 4, limit=24)
    '01234567 [...] 123456789'
    """
    text = _cut(text, limit)  # escaping megabytes would take long
    shown = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)
    return _cut(shown.encode("utf-8", "backslashreplace").decode("utf-8"), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    mark = " [...] "
    left = (limit - len(mark)) // 2
    return text[:left] + mark + text[-(limit - len(mark) - left) :]


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically: it is replaced as a whole, or unchanged if it cannot be written.

    Args:
        path: of the file; its folder exists.
        content: that JSON can represent.

    Raises:
        OSError: if it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Args:
        path: of a regular file of at most 4 MB.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is another kind of file (a FIFO would wait for ever), too large, or not JSON.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode) or info.st_size > _MAX_FILE:
        raise ValueError(f"{path}: expected a regular file of at most {_MAX_FILE} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 to 2**63 - 1, and not a bool.

    Args:
        value: any.
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
