"""The outcome of a run as one word."""

from __future__ import annotations

from pathlib import Path

from stabletrain.launch.result import End, Result

_BY_END: dict[End, str] = {
    "failed": "failed",
    "refused": "failed",
    "stopped": "stopped",
    "interrupted": "killed",
    "terminated": "killed",
    "killed": "killed",
}


def outcome_of(folder: Path, result: Result) -> str | None:
    """Return ``stopped``, ``killed`` or ``failed``; None for a run that has finished, of which its record decides.

    Args:
        folder: the run's folder.
        result: how the run ended.
    """
    return _BY_END.get(result.end)
