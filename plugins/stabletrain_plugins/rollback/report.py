"""The content of ``report.json``, in the diagnosis of a run that rollback stops."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stabletrain.runtime.data.train_loader import DataMark, TrainLoader
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.records import diagnosis
from stabletrain_plugins.rollback.incidents import IncidentTracker

_MAX_BATCHES = 500
"""Maximum number of batches in the report."""
_MAX_EVENTS = 100
"""Maximum number of events in the report."""


def stop_report(
    reason: str,
    guard: StepGuard,
    loader: TrainLoader,
    incidents: IncidentTracker,
    default: DataMark | None,
    rollbacks: Iterable[int],
    last_batch: tuple[Any, int],
) -> dict[str, Any]:
    """Describe a run at its stop. A collective.

    Args:
        reason: of the stop.
        guard: of the run.
        loader: has the tape.
        incidents: with the current incident.
        default: list the batches since this position if there is no incident.
        rollbacks: attempted steps of the rollbacks.
        last_batch: the last batch and its number.
    """
    return {
        "reason": reason,
        "attempted_steps": guard.counters.attempted,
        "applied_steps": guard.trainer.global_step,
        "rollbacks_at": list(rollbacks),
        "incident_since": incidents.current.step if incidents.current else None,
        "batches_since": [list(item.identity) for item in incidents.batches(loader, default)[-_MAX_BATCHES:]],
        "batches_excluded": [list(each) for each in sorted(loader.excluded, key=repr)],
        **diagnosis.of_model(guard.module, *last_batch),
        "events": [event._asdict() for event in list(guard.events.recent)[-_MAX_EVENTS:]],
    }
