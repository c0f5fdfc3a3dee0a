"""The outcome of a run as one word, in the tag ``stabletrain.outcome`` of its MLflow run."""

from __future__ import annotations

import logging
from pathlib import Path

from stabletrain.launch.result import Result

OUTCOME = "stabletrain.outcome"
"""The tag: one of the words of `stabletrain.tracking.findings.OUTCOMES`."""

_logger = logging.getLogger("stabletrain")


def outcome_of(folder: Path, result: Result) -> str | None:
    """Return the outcome of the run in a folder; None if it cannot be told. Never fails.

    Args:
        folder: the run's folder.
        result: how the run ended.
    """
    try:
        from stabletrain.launch.run_series import series_of_folder
        from stabletrain.tracking.findings import outcome

        return outcome(series_of_folder(folder), result.end)
    except Exception as error:  # a run that has ended well stays so, whatever its record looks like
        _logger.debug("the outcome of %s is unknown: %s: %s", folder, type(error).__name__, error)
        return None


def tag_outcome(uri: str, run_id: str, folder: Path, result: Result) -> None:
    """Set the tag of a run that has ended, if its outcome is known.

    Args:
        uri: tracking URI of the store.
        run_id: of the run.
        folder: the run's folder.
        result: how the run ended.

    Raises:
        MlflowException: if the store cannot be written.
    """
    word = outcome_of(folder, result)
    if word is not None:
        from stabletrain.tracking.store import open_client

        open_client(uri).set_tag(run_id, OUTCOME, word)
