"""How a run ended: the worker writes it to result.json, the launcher reads it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

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


@dataclass(frozen=True, kw_only=True)
class Result:
    """The end of one run.

    Args:
        end: ``finished``; ``failed`` (an exception); ``stopped`` (by a plugin); ``refused`` (a `UserError` before the
            first step); ``interrupted`` (Ctrl-C); ``terminated`` (SIGTERM); ``killed`` (the worker died without writing
            a result).
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
        """
        scratch = run_dir / f".{RESULT}.{os.getpid()}"
        scratch.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        scratch.replace(run_dir / RESULT)


def read_result(run_dir: Path) -> Result | None:
    """Return the result in a run's folder; None if there is none that can be read.

    Args:
        run_dir: the run's folder.
    """
    try:
        return Result(**json.loads((run_dir / RESULT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
