"""Faults of one of two ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from hostile_suite.trial import HANG, Trial, prepare, problems_of, run, statuses, train, trial

KIND = "faults on one of two ranks"
WORDS = ("run_dir=run", "trainer.max_steps=40")
TWO = "launch.processes=2"

FAULTS = {
    "raises": (1, "failed", "FAILED"),
    "mistake": (1, "failed", "FAILED"),
    "exits:5": (1, "failed", "FAILED"),
    "leaves:7": (1, "failed", "FAILED"),
    "send:SIGKILL": (1, "killed", "KILLED"),
    "send:SIGTERM": (143, "terminated", "KILLED"),
}
"""What a rank does -> exit code, end and MLflow status of the run."""


def trials(folder: Path, seed: int, count: int) -> Iterator[Trial]:
    """Run ``count`` trainings with two ranks, one of which fails at the twelfth step.

    Args:
        folder: for the runs.
        seed: not used: all faults are listed.
        count: how many of them.
    """
    cases = [(does, rank) for does in FAULTS for rank in (0, 1)]
    for number, (does, rank) in enumerate(cases[:count]):
        yield _try(prepare(folder / str(number)), does, rank)


def _try(folder: Path, does: str, rank: int) -> Trial:
    code, end, status = FAULTS[does]
    faulty = (f"model.does={does}", "model.at=12", f"model.rank={rank}")
    ended = run(train(*WORDS, TWO, *faulty), folder, limit=2 * HANG)
    problems = problems_of(ended, codes=(code,), traceback=does == "raises")
    if does == "raises" and ended.output.count("a bug in the user's module") == 0:
        problems.append("the cause is not named")
    result = folder / "run" / "result.json"
    found = json.loads(result.read_text())["end"] if result.is_file() else "none"
    if found != end:
        problems.append(f"result.json says {found}, expected {end}")
    if statuses(folder) != [status]:
        problems.append(f"MLflow says {statuses(folder)}, expected {status}")
    return trial(KIND, f"{does} on rank {rank}", problems, ended)
