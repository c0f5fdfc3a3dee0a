"""Tracks incidents: from which step, and from which position in the data, a run has been unhealthy."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from stabletrain.core.outcome import Outcome
from stabletrain.core.spikes import SpikeState
from stabletrain.runtime.data.tape import TapedBatch
from stabletrain.runtime.data.train_loader import DataMark, TrainLoader

RECOVERY_STEPS = 10
"""Healthy steps in a row that end an incident."""


class Incident(NamedTuple):
    """The beginning of an incident.

    Args:
        step: the first attempted step that was not healthy, from 0.
        applied: applied steps before it.
        mark: the data position before it; None if unknown.
    """

    step: int
    applied: int
    mark: DataMark | None


class IncidentTracker:
    """Opens an incident at an unhealthy step, and closes it after `RECOVERY_STEPS` healthy ones in a row."""

    def __init__(self) -> None:
        self.current: Incident | None = None
        """The open incident, if there is one."""
        self._healthy_in_a_row = 0
        # starts of the last steps: attempted, applied, data position; in device mode an outcome comes a step late
        self._step_starts: deque[tuple[int, int, DataMark]] = deque(maxlen=4)

    @property
    def last_step_was_healthy(self) -> bool:
        """Whether the last observed step was healthy; False before the first."""
        return self._healthy_in_a_row > 0

    @property
    def oldest_mark(self) -> DataMark:
        """The oldest data position that `batches` may need."""
        return (self.current.mark if self.current else None) or self._step_starts[0][2]

    def on_step_end(self, attempted: int, applied: int, mark: DataMark) -> None:
        """Remember the state in which the next step starts.

        Args:
            attempted: attempted steps so far, one in flight included.
            applied: applied steps so far.
            mark: the data position.
        """
        self._step_starts.append((attempted, applied, mark))

    def on_outcome(self, healthy: bool, step: int, applied: int) -> None:
        """Open or close an incident.

        Args:
            healthy: whether the step was healthy, see `is_healthy`.
            step: number of the attempted step, from 0.
            applied: applied steps so far; used if the start of the step is no longer known.
        """
        self._healthy_in_a_row = self._healthy_in_a_row + 1 if healthy else 0
        if self._healthy_in_a_row >= RECOVERY_STEPS:
            self.current = None
        elif not healthy and self.current is None:
            start = next(((at, mark) for number, at, mark in self._step_starts if number == step), None)
            self.current = Incident(step, *(start or (applied, None)))

    def batches(self, loader: TrainLoader, default: DataMark | None = None) -> list[TapedBatch]:
        """The batches since the incident began, oldest first.

        Args:
            loader: has the tape.
            default: return the batches since this position if there is no incident, or its position is unknown; None:
                return none then.
        """
        mark = (self.current.mark if self.current else None) or default
        return list(loader.batches_since(mark).values()) if mark is not None else []

    def close(self) -> None:
        """Close the incident: what came after it is meant."""
        self.current = None

    def clear(self) -> None:
        """After a restore: close the incident, and forget the steps that were undone."""
        self.current = None
        self._healthy_in_a_row = 0
        self._step_starts.clear()


def is_healthy(state: SpikeState, outcome: Outcome) -> bool:
    """Whether a step was applied, with finite loss and gradient norm, and both signals are at their baselines.

    Args:
        state: of the detector, after this step.
        outcome: of the step.
    """
    finite = math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)
    return finite and not outcome.skipped and not state.loss_excursion.steps and not state.norm_excursion.steps
