"""Finds the batches on the data tape that a rollback excludes."""

from __future__ import annotations

from collections.abc import Sequence

from stabletrain.runtime.data.tape import TapedBatch
from stabletrain.runtime.data.train_loader import DataMark, TrainLoader
from stabletrain.runtime.records.event_log import logger
from stabletrain_plugins.rollback.decision import Exclusion
from stabletrain_plugins.rollback.incidents import IncidentTracker


def batches_to_exclude(
    exclusion: Exclusion, incidents: IncidentTracker, loader: TrainLoader, mark: DataMark | None, window: int
) -> list[TapedBatch]:
    """The batches to exclude, oldest first; with several train loaders none, and a warning.

    Args:
        exclusion: which batches.
        incidents: with the current incident.
        loader: has the tape.
        mark: data position of the state that is restored; None: the data position stays, as with a checkpoint. Then the
            batches of the incident are excluded from later epochs.
        window: micro-batches per optimizer step.
    """
    if exclusion.drop == "none":
        return []
    if len(loader.loaders) > 1:
        logger.warning(
            "rollback: no batches are excluded: with %d train loaders, a batch consists of several. Use one train "
            "loader, or drop=none (config key plugins.spike.drop)",
            len(loader.loaders),
        )
        return []
    offending = incidents.batches(loader)
    if mark is None:
        return offending
    batches = list(loader.batches_since(mark).values())
    if exclusion.drop == "since_snapshot":
        return batches
    return last_windows(batches, max(len(offending), exclusion.at_least), window)


def last_windows(batches: Sequence[TapedBatch], count: int, window: int) -> list[TapedBatch]:
    """The last ``count`` micro-batches, and the others of their accumulation windows.

    Args:
        batches: consecutive batches, oldest first.
        count: micro-batches, >= 0; more than there are means all.
        window: micro-batches per optimizer step; a new epoch starts a new window.
    """
    chosen = {(batch.epoch, batch.position // window) for batch in batches[max(0, len(batches) - count) :]}
    return [batch for batch in batches if (batch.epoch, batch.position // window) in chosen]
