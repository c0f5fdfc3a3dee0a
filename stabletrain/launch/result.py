"""How a run ended: the worker writes it to result.json, the launcher reads it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeGuard

from stabletrain.launch.bounded import is_count, one_message, read_json, write_json
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

_MAX_METRICS = 10_000
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""How `write_json` writes numbers that JSON does not have."""
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
        seconds: duration of the worker since the run was opened.
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
        and all(_is_number(value) or value in _NOT_FINITE for value in metrics.values()),
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


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)
