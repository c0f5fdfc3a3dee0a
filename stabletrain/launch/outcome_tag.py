"""The outcome of a run as one word, for the tag ``stabletrain.outcome``: its record decides, unless it ended early."""

from __future__ import annotations

import logging
from pathlib import Path

from stabletrain.launch.result import Result


def outcome_of(folder: Path, result: Result, uri: str | None = None) -> str | None:
    """Return ``healthy``, ``spiked``, ``rolled_back``, ``diverged``, ``stopped``, ``killed`` or ``failed``.

    Args:
        folder: the run's folder.
        result: how the run ended.
        uri: tracking URI of its store; None: the default.

    Returns:
        The word; None if the record does not say it.
    """
    from stabletrain.launch.recorded_run import run_in_folder
    from stabletrain.launch.run_series import loss_series
    from stabletrain.tracking.findings import outcome, outcome_by_end

    try:
        by_end = outcome_by_end(result.end)
        if by_end is not None:
            return by_end
        series = loss_series(run_in_folder(folder, command="report", uri=uri, remote=False))
        return outcome(series, result.end) if len(series.step) else None
    except Exception as error:  # a record that somebody has damaged changes no end of a run
        logging.getLogger("stabletrain").debug("no outcome of %s: %s: %s", folder, type(error).__name__, error)
        return None
