"""Step counters of a run, and the metrics computed from outcomes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.outcome import Outcome

LEARNING_RATE = MetricInfo("stability/lr", "rate", "that the last step used, of the first parameter group")
METRICS = (
    MetricInfo("stability/loss", "the module's", "mean of the steps since the last point that were applied or finite"),
    MetricInfo("stability/grad_norm", "L2", "mean over the same steps of the global norm, before any clipping"),
    MetricInfo("stability/grad_norm_max", "L2", "largest of these norms"),
    LEARNING_RATE,
    MetricInfo("stability/clipped_share", "0 to 1", "share of the steps since the last point that were clipped"),
    MetricInfo("stability/skipped", "steps", "dropped by a plugin since the run began"),
    MetricInfo("stability/loss_scale", "factor", "on the loss of the next step, with an fp16 loss scaler"),
    MetricInfo("stability/overflows", "steps", "dropped by the fp16 loss scaler since the run began; after the first"),
)
"""The metrics of the guard, which writes them whatever the plugins are."""

MAX_COUNTED_SAMPLES = 1000
"""Number of samples that are counted at the same time."""


class Counters(NamedTuple):
    """Steps of the run so far, restored with a checkpoint, and not changed when a rollback undoes steps.

    Args:
        attempted: attempted optimizer steps.
        skipped: dropped by a rule, or because there was no loss.
        overflows: dropped by the fp16 loss scaler.
        clipped: applied with a gradient that a transform or a bound made smaller.
        overflows_in_a_row: consecutive overflows up to the last step.
        rollbacks: events of rollbacks.
        dropped_by: steps that each plugin dropped; a step may be dropped by several.
        dropped_samples: how often each sample was in a step that a rule dropped, where samples are known. If there are
            more than `MAX_COUNTED_SAMPLES`, only the most frequent ones, and their counts are lower bounds.
        without_loss: skipped steps for which ``training_step`` gave no loss, on one rank or more.
    """

    attempted: int = 0
    skipped: int = 0
    overflows: int = 0
    clipped: int = 0
    overflows_in_a_row: int = 0
    rollbacks: int = 0
    dropped_by: Mapping[str, int] = {}
    dropped_samples: Mapping[int | str, int] = {}
    without_loss: int = 0

    @property
    def applied(self) -> int:
        """Steps that changed the parameters."""
        return self.attempted - self.skipped - self.overflows

    def add(self, outcome: Outcome) -> Counters:
        """The counts after one more step."""
        applied = not (outcome.skipped or outcome.overflow)
        if applied and not self.overflows_in_a_row:  # nearly every step
            clipped = self.clipped + (outcome.applied_norm < outcome.grad_norm)
            return Counters(self.attempted + 1, self.skipped, self.overflows, clipped, 0, *self[5:])
        return self._replace(
            attempted=self.attempted + 1,
            skipped=self.skipped + outcome.skipped,
            overflows=self.overflows + outcome.overflow,
            clipped=self.clipped + outcome.clipped,
            overflows_in_a_row=self.overflows_in_a_row if outcome.no_loss else outcome.overflows_in_a_row,
            without_loss=self.without_loss + outcome.no_loss,
        )

    def add_drop(self, plugins: Iterable[str], samples: Iterable[int | str]) -> Counters:
        """The counts after a step was dropped by these plugins, which had these samples.

        A sample that was in more than one in `MAX_COUNTED_SAMPLES` of all is never lost (Misra and Gries, 1982).
        """
        by, counts = dict(self.dropped_by), dict(self.dropped_samples)
        for plugin in plugins:
            by[plugin] = by.get(plugin, 0) + 1
        for sample in samples:
            if sample in counts or len(counts) < MAX_COUNTED_SAMPLES:
                counts[sample] = counts.get(sample, 0) + 1
            else:
                counts = {each: count - 1 for each, count in counts.items() if count > 1}
        return self._replace(dropped_by=by, dropped_samples=counts)


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
        applied, loss, norm = outcome.applied, outcome.loss, outcome.grad_norm
        self._clipped += applied and outcome.applied_norm < norm
        # a dropped step is a batch never seen: what was wrong with it is an event, and no part of a mean
        if applied or math.isfinite(loss):
            self._losses.append(loss)
        if applied or math.isfinite(norm):
            self._norms.append(norm)

    def take(self, counters: Counters) -> dict[str, float]:
        """The metrics since the last call; empty if there was no step.

        ``loss`` and ``grad_norm`` are means over the steps that were applied, or finite: a step with a NaN or infinity
        that was applied makes them non-finite, one that was dropped does not. ``clipped_share`` is a share of these
        steps, ``skipped`` counts since the start of the run.
        """
        if not self._steps:
            return {}
        metrics = {"clipped_share": self._clipped / self._steps, "skipped": float(counters.skipped)}
        if self._losses:
            metrics["loss"] = _mean(self._losses)
        if self._norms:
            metrics["grad_norm"] = _mean(self._norms)
            metrics["grad_norm_max"] = math.nan if math.isnan(metrics["grad_norm"]) else max(self._norms)
        self._clear()
        return metrics


def _mean(values: list[float]) -> float:
    """The mean; non-finite if a value is."""
    try:
        return math.fsum(values) / len(values)
    except (ValueError, OverflowError):  # infinities of both signs; a sum beyond the largest float
        return sum(value / len(values) for value in values)
