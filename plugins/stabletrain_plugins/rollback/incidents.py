"""When trouble began: the step, and the place in the data, from which everything is under suspicion."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

from stabletrain.core.outcome import Outcome
from stabletrain.core.spikes import SpikeState
from stabletrain.runtime.data.tape import TapedBatch
from stabletrain.runtime.data.train_loader import DataMark, TrainLoader

RECOVERY_STEPS = 10
"""Healthy steps in a row that end a suspicion."""


class Incident(NamedTuple):
    """The beginning of trouble.

    Args:
        step: the first attempted step that was not healthy.
        applied: applied steps before it.
        mark: the data position before it; None if it is not known.
    """

    step: int
    applied: int
    mark: DataMark | None


class IncidentTracker:
    """Follows the outcomes of a run."""

    def __init__(self) -> None:
        self.since: Incident | None = None
        """The present suspicion; None in good times."""
        self._healthy = 0
        self._places: deque[tuple[int, int, DataMark]] = deque(maxlen=4)  # in device mode an outcome comes a step late

    @property
    def last_step_was_healthy(self) -> bool:
        """Whether nothing was wrong with the last step; False before the first."""
        return self._healthy > 0

    def step_ends(self, attempted: int, applied: int, mark: DataMark) -> None:
        """Remember where the next step begins.

        Args:
            attempted: attempted steps so far, one in flight included.
            applied: applied steps so far.
            mark: the data position.
        """
        self._places.append((attempted, applied, mark))

    @property
    def oldest_mark(self) -> DataMark:
        """Nobody asks for an older place of the data than this."""
        return (self.since.mark if self.since else None) or self._places[0][2]

    def outcome(self, healthy: bool, step: int, applied: int) -> None:
        """A step is over.

        Args:
            healthy: whether nothing was wrong with it.
            step: its number, in attempted steps.
            applied: applied steps so far.
        """
        self._healthy = self._healthy + 1 if healthy else 0
        if self._healthy >= RECOVERY_STEPS:
            self.since = None
        elif not healthy and self.since is None:
            known = next(((at, mark) for number, at, mark in self._places if number == step), None)
            self.since = Incident(step, *(known or (applied, None)))

    def batches(self, loader: TrainLoader, otherwise: DataMark | None) -> list[TapedBatch]:
        """The batches since it began.

        Args:
            loader: keeps the tape.
            otherwise: where to begin if it is not known.
        """
        mark = (self.since.mark if self.since else None) or otherwise
        return list(loader.batches_since(mark).values()) if mark is not None else []

    def is_over(self) -> None:
        """What was suspicious is undone."""
        self.since = None
        self._healthy = 0
        self._places.clear()


def is_healthy(state: SpikeState, outcome: Outcome) -> bool:
    """Whether nothing is wrong with a step: it was applied, finite, and no signal is away from its baseline.

    Args:
        state: the detector's, with this step.
        outcome: of the step.
    """
    finite = math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)
    return finite and not outcome.skipped and not state.loss_excursion.steps and not state.norm_excursion.steps


def offending(
    trouble: IncidentTracker, loader: TrainLoader, since: DataMark, at_least: int, window: int
) -> list[TapedBatch]:
    """The batches to leave out: those since the suspicion began, whole accumulation windows.

    Args:
        trouble: what is suspicious.
        loader: keeps the tape.
        since: they come after this place.
        at_least: so many of the last ones.
        window: micro-batches of a step.
    """
    items = list(loader.batches_since(since).values())
    count = min(max(len(trouble.batches(loader, None)), at_least), len(items))
    chosen = {(item.epoch, item.position // window) for item in items[len(items) - count :]}
    return [item for item in items if (item.epoch, item.position // window) in chosen]
