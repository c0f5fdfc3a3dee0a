"""Step counters of a run, and the metrics computed from outcomes."""

from __future__ import annotations

import math
from typing import NamedTuple

from stabletrain.core.outcome import Outcome


class Counters(NamedTuple):
    """Steps of the run so far, restored with a checkpoint.

    Args:
        attempted: attempted optimizer steps.
        skipped: dropped by a rule.
        overflows: dropped by the fp16 loss scaler.
        clipped: applied with a gradient that a transform or a bound made smaller.
        overflows_in_a_row: consecutive overflows up to the last step.
    """

    attempted: int = 0
    skipped: int = 0
    overflows: int = 0
    clipped: int = 0
    overflows_in_a_row: int = 0

    @property
    def applied(self) -> int:
        """Steps that changed the parameters."""
        return self.attempted - self.skipped - self.overflows

    def add(self, outcome: Outcome) -> Counters:
        """The counts after one more step."""
        return Counters(
            self.attempted + 1,
            self.skipped + outcome.skipped,
            self.overflows + outcome.overflow,
            self.clipped + outcome.clipped,
            outcome.overflows_in_a_row,
        )


class MetricsWindow:
    """Sums and means of the steps since the last flush of metrics."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._steps = self._clipped = 0
        self._losses: list[float] = []
        self._norms: list[float] = []

    def add(self, outcome: Outcome) -> None:
        """Add one step."""
        self._steps += 1
        self._clipped += outcome.clipped
        if math.isfinite(outcome.loss):
            self._losses.append(outcome.loss)
        if math.isfinite(outcome.grad_norm):
            self._norms.append(outcome.grad_norm)

    def take(self, counters: Counters) -> dict[str, float]:
        """The metrics since the last call; empty if there was no step.

        ``loss`` and ``grad_norm`` are means over the finite steps, ``clipped`` is a share of the steps, ``skipped``
        counts since the start of the run.
        """
        if not self._steps:
            return {}
        metrics = {"clipped": self._clipped / self._steps, "skipped": float(counters.skipped)}
        if self._losses:
            metrics["loss"] = math.fsum(self._losses) / len(self._losses)
        if self._norms:
            metrics["grad_norm"] = math.fsum(self._norms) / len(self._norms)
            metrics["grad_norm_max"] = max(self._norms)
        self._clear()
        return metrics
