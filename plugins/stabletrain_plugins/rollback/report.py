"""What a run that is given up says about itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stabletrain.runtime.data.train_loader import DataMark, TrainLoader
from stabletrain.runtime.guard.step_guard import StepGuard
from stabletrain.runtime.records import diagnosis
from stabletrain_plugins.rollback.incidents import IncidentTracker

_MOST = 500
"""Batches that are named."""


def report(
    reason: str,
    guard: StepGuard,
    loader: TrainLoader,
    trouble: IncidentTracker,
    otherwise: DataMark | None,
    rollbacks: Iterable[int],
    last_batch: tuple[Any, int],
) -> dict[str, Any]:
    """The content of ``report.json``. A collective.

    Args:
        reason: of the end.
        guard: of the run.
        loader: keeps the tape.
        trouble: what is suspicious.
        otherwise: from where on batches are named if nothing is.
        rollbacks: attempted steps at which there was one.
        last_batch: the last batch, and its number.
    """
    return {
        "reason": reason,
        "attempted_steps": guard.counters.attempted,
        "applied_steps": guard.trainer.global_step,
        "rollbacks_at": list(rollbacks),
        "trouble_since": trouble.since.step if trouble.since else None,
        "batches_since": [list(item.identity) for item in trouble.batches(loader, otherwise)[-_MOST:]],
        "batches_excluded": [list(each) for each in sorted(loader.excluded, key=repr)],
        **diagnosis.of_model(guard.module, *last_batch),
        "events": [event._asdict() for event in list(guard.events.recent)[-100:]],
    }
