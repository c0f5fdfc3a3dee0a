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
        mark: the data position before it; None if it is not known yet. After a restart the position of the restart.
    """

    step: int
    applied: int
    mark: DataMark | None


class IncidentState(NamedTuple):
    """An incident in a checkpoint, which does not have its data position.

    Args:
        start: attempted steps, and applied steps, before the open incident; None: no incident is open.
        healthy_in_a_row: healthy steps up to the last one.
        unhealthy_in_a_row: unhealthy steps up to the last one.
        losses: the last finite losses of the open incident.
        norms: the gradient norms of the same steps.
    """

    start: tuple[int, int] | None = None
    healthy_in_a_row: int = 0
    unhealthy_in_a_row: int = 0
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()


class IncidentTracker:
    """Opens an incident at an unhealthy step, and closes it after `RECOVERY_STEPS` healthy ones in a row.

    Args:
        steps: number of the incident's last steps whose loss and norm are stored.
    """

    def __init__(self, steps: int) -> None:
        self.current: Incident | None = None
        """The open incident, if there is one."""
        self.unhealthy_in_a_row = 0
        """Unhealthy steps up to the last one."""
        self._signals: deque[tuple[float, float]] = deque(maxlen=steps)
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
        if self.current is not None and self.current.mark is None:  # continued from a checkpoint: its batches from here
            self.current = self.current._replace(mark=mark)

    @property
    def losses(self) -> tuple[float, ...]:
        """The last finite losses of the open incident."""
        return tuple(loss for loss, _ in self._signals)

    @property
    def norms(self) -> tuple[float, ...]:
        """The gradient norms of the same steps."""
        return tuple(norm for _, norm in self._signals)

    def on_outcome(self, healthy: bool, outcome: Outcome, applied: int) -> None:
        """Open or close an incident.

        Args:
            healthy: whether the step was healthy, see `is_healthy`.
            outcome: of the step.
            applied: applied steps so far; used if the start of the step is no longer known.
        """
        self._healthy_in_a_row = self._healthy_in_a_row + 1 if healthy else 0
        self.unhealthy_in_a_row = 0 if healthy else self.unhealthy_in_a_row + 1
        if self._healthy_in_a_row >= RECOVERY_STEPS:
            self.close()
        elif not healthy and self.current is None:
            start = next(((at, mark) for number, at, mark in self._step_starts if number == outcome.step), None)
            self.current = Incident(outcome.step, *(start or (applied, None)))
        if self.current is not None and math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm):
            self._signals.append((outcome.loss, outcome.grad_norm))

    def close(self) -> None:
        """Close the incident: what comes after it is no part of it."""
        self.current = None
        self._signals.clear()

    def batches(self, loader: TrainLoader, default: DataMark | None = None) -> list[TapedBatch]:
        """The batches since the incident began, oldest first.

        Args:
            loader: has the tape.
            default: return the batches since this position if there is no incident, or its position is unknown; None:
                return none then.
        """
        mark = (self.current.mark if self.current else None) or default
        return list(loader.batches_since(mark).values()) if mark is not None else []

    def clear(self) -> None:
        """After a restore: close the incident, and forget the steps that were undone."""
        self.close()
        self._healthy_in_a_row = self.unhealthy_in_a_row = 0
        self._step_starts.clear()

    def state(self) -> IncidentState:
        """For a checkpoint."""
        start = None if self.current is None else (self.current.step, self.current.applied)
        return IncidentState(start, self._healthy_in_a_row, self.unhealthy_in_a_row, self.losses, self.norms)

    def load(self, state: IncidentState) -> None:
        """Continue from a checkpoint."""
        self.current = None if state.start is None else Incident(*state.start, None)
        self._healthy_in_a_row, self.unhealthy_in_a_row = state.healthy_in_a_row, state.unhealthy_in_a_row
        self._signals.clear()
        self._signals.extend(zip(state.losses, state.norms, strict=True))


def is_healthy(state: SpikeState, outcome: Outcome) -> bool:
    """Whether a step was applied, with finite loss and gradient norm, and both signals are at their baselines.

    Args:
        state: of the detector, after this step.
        outcome: of the step.
    """
    finite = math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)
    return finite and not outcome.skipped and not state.loss_excursion.steps and not state.norm_excursion.steps
