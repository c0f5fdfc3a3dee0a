"""How a run ended: written by the worker as result.json, read by the launcher."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

End = Literal["finished", "failed", "stopped", "refused", "interrupted", "terminated", "killed"]

FILE = "result.json"

EXIT_CODES: dict[End, int] = {
    "finished": 0,
    "failed": 1,
    "killed": 1,
    "refused": 2,
    "stopped": 3,
    "interrupted": 130,
    "terminated": 143,
}

MLFLOW: dict[End, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "refused": "FAILED",
    "stopped": "FAILED",
    "interrupted": "KILLED",
    "terminated": "KILLED",
    "killed": "KILLED",
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of one run.

    Args:
        end: ``finished``; ``failed`` (an exception); ``stopped`` (by a plugin); ``refused`` (the user's mistake, before
            the first step); ``interrupted`` (Ctrl-C); ``terminated`` (SIGTERM); ``killed`` (the worker could not say).
        message: one line for a person.
        steps: applied optimizer steps.
        seconds: duration of the worker.
        metrics: the last value of every logged metric.
        checkpoint: the checkpoint to go on from, if there is one.
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
        """What the command line exits with."""
        return EXIT_CODES[self.end]

    def write(self, run_dir: Path) -> None:
        """Write result.json, whole or not at all.

        Args:
            run_dir: the run's folder.
        """
        scratch = run_dir / f".{FILE}.{os.getpid()}"
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        scratch.replace(run_dir / FILE)


def read_result(run_dir: Path) -> Result | None:
    """Return what the worker wrote, or None if it did not come to it.

    Args:
        run_dir: the run's folder.
    """
    try:
        return Result(**json.loads((run_dir / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
