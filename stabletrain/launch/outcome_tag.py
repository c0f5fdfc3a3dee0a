"""The outcome of a run as one word, for the tag ``stabletrain.outcome``."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from typing import Any

from stabletrain.launch.result import End, Result

OUTCOME = "stabletrain.outcome"
_FINDINGS = "stabletrain.tracking.findings"

_BY_END: dict[End, str] = {
    "failed": "failed",
    "refused": "failed",
    "stopped": "stopped",
    "interrupted": "killed",
    "terminated": "killed",
    "killed": "killed",
}
"""The word for a run that did not finish; what happened in one that did says its record."""


def outcome_of(folder: Path, result: Result) -> str | None:
    """Return ``healthy``, ``spiked``, ``rolled_back``, ``diverged``, ``stopped``, ``killed`` or ``failed``.

    Args:
        folder: the run's folder.
        result: how the run ended.

    Returns:
        The word; None if the record does not say it.
    """
    try:
        findings: Any = importlib.import_module(_FINDINGS)
    except ModuleNotFoundError as error:
        if error.name != _FINDINGS:
            raise
        return _BY_END.get(result.end)
    try:
        return str(findings.outcome(findings.series_of_folder(folder), result.end))
    except Exception as error:  # a record that somebody has damaged changes no end of a run
        logging.getLogger("stabletrain").debug("no outcome: %s", error)
        return _BY_END.get(result.end)
