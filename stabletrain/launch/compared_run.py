"""What a comparison and a page show of one recorded run, of stabletrain or of another tool, as far as it has it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import TYPE_CHECKING

from stabletrain.core import metric_names
from stabletrain.core.events import Event
from stabletrain.launch.curve_names import CURVES, names_of
from stabletrain.launch.recorded_run import RecordedRun
from stabletrain.launch.result import read_result
from stabletrain.launch.run_end import OUTCOME
from stabletrain.launch.run_series import loss_series
from stabletrain.runtime.records.steps_file import Flag, Steps
from stabletrain.tracking import findings, measures
from stabletrain.tracking.comparison import RunSummary
from stabletrain.tracking.differences import parameters, params_of
from stabletrain.tracking.page_data import PageRun
from stabletrain.tracking.series import Series
from stabletrain.tracking.thinning import Curve

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EVERY_STEP = "every attempted step"
"""Where the loss of a run with a record of its steps comes from."""


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    """A run that is read piece by piece, each once, as it is needed.

    Args:
        run: as it was found.
    """

    run: RecordedRun
    _curves: dict[str, Curve | None] = field(default_factory=dict)

    @cached_property
    def is_ours(self) -> bool:
        """Whether plugins have recorded it, so that what they have not counted did not happen."""
        return self.steps is not None or any(map(metric_names.is_own, self.run.metrics))

    @cached_property
    def steps(self) -> Steps | None:
        """The record of every step; None if there is none."""
        found = self.run.steps()
        return found if found is not None and len(found.step) else None

    @cached_property
    def series(self) -> Series:
        """The loss, for the numbers and the outcome that `report` shows, too."""
        return loss_series(self.run)

    @cached_property
    def events(self) -> Sequence[Event]:
        """The events of the plugins."""
        return self.run.events() if self.is_ours else []

    @cached_property
    def loss_from(self) -> str:
        """Where the loss comes from, in words; empty if it has none."""
        if self.steps is not None:
            return EVERY_STEP
        name = self._metric("loss")
        return f"the metric {name}" if name else ""

    def curve(self, key: str) -> Curve | None:
        """Return a curve, from the record of every step if that has it; None if there is none.

        Args:
            key: of a chart.

        Raises:
            StoreError: if the store cannot be read.
        """
        if key not in self._curves:
            self._curves[key] = self._read(key)
        return self._curves[key]

    def _read(self, key: str) -> Curve | None:
        import numpy as np

        if self.steps is not None and key in ("loss", "grad_norm"):
            has = (self.steps.flags & Flag.NO_LOSS.value) == 0
            return Curve(self.steps.step[has], (self.steps.loss if key == "loss" else self.steps.grad_norm)[has])
        name = self._metric(key)
        history = self.run.history(name) if name else []
        if not history:
            return None
        step, value = zip(*history, strict=True)
        return Curve(np.array(step, np.int64), np.array(value, np.float64))

    def _metric(self, key: str) -> str | None:
        return next(iter(names_of(key, self.run.metrics)), None)

    @cached_property
    def measures(self) -> dict[str, float]:
        """The numbers by which runs are compared; those that are not known are missing."""
        found: dict[str, float] = {}
        if self.steps is not None:
            found |= measures.of_steps(self.steps)
        elif (curve := self.curve("loss")) is not None:
            found["steps"] = float(curve.step[-1] + 1)
        if len(self.series.step):
            found |= measures.of_series(self.series, exact=self.steps is not None)
        if (curve := self.curve("val_loss")) is not None:
            finite = [value for value in curve.value.tolist() if value == value]
            found["val_loss"] = float(curve.value[-1])
            found |= {"best_val_loss": min(finite)} if finite else {}
        found = (self._counted() if self.is_ours else {}) | found
        for key in ("tokens_per_s", "samples_per_s"):
            if rates := [value for _, value in self.run.history(f"throughput/{key}")]:
                found[key] = statistics.median(rates)
                break
        if (peak := self.run.metrics.get("throughput/peak_memory_mib")) is not None:
            found["peak_memory_mib"] = peak
        if (seconds := self._seconds()) is not None:
            found["wall_s"] = seconds
        return found

    def _counted(self) -> dict[str, float]:
        """What the plugins have counted, in metrics; one that none of them has written is zero."""
        found = {
            key: self._total(f"stability/{key}") for key in ("skipped", "overflows", "rollbacks", "batches_excluded")
        }
        if self.steps is None and (share := self.run.history("stability/clipped_share")):
            found["clipped_share"] = sum(value for _, value in share) / len(share)
        if self.steps is None and self._total("stability/spike_score", missing=-1.0) >= 0:  # there was a detector
            found["spikes"] = float(sum(event.kind == "spike" for event in self.events))
        return found

    def _total(self, name: str, missing: float = 0.0) -> float:
        """A count over all instances of a plugin: ``stability/rollbacks``, ``stability/second/rollbacks``."""
        last = name.removeprefix(metric_names.OWN)
        values = [
            value
            for each, value in self.run.metrics.items()
            if each == name or fnmatchcase(each, f"{metric_names.OWN}*/{last}")
        ]
        if last in ("skipped", "overflows") and name in self.run.metrics:  # one for each optimizer, and one for all
            return self.run.metrics[name]
        return sum(values) if values else missing

    def _seconds(self) -> float | None:
        if self.run.start_ms is None:
            result = None if self.run.folder is None else read_result(self.run.folder)
            return result.seconds if result is not None and result.seconds else None
        end = self.run.end_ms
        if end is None:
            end = round(time.time() * 1000) if self.run.status == "RUNNING" else None
        return None if end is None else (end - self.run.start_ms) / 1000

    def _outcome(self) -> str:
        """The outcome of a run without the tag, such as one of another tool, as far as its record says it."""
        if self.run.status != "FINISHED":
            return self.run.status.lower()
        return findings.outcome(self.series, self.run.status) if len(self.series.step) else "finished"

    @cached_property
    def summary(self) -> RunSummary:
        """The run as a column of a comparison."""
        return RunSummary(
            run_id=self.run.run_id or "",
            name=self.run.name,
            status=self.run.status,
            params=parameters(self.run.params or params_of(self.run.config() or {}), self.run.tags),
            metrics=self.run.metrics,
            tags=self.run.tags,
            measures=self.measures,
            outcome=self.run.tags.get(OUTCOME) or self._outcome(),
        )


def page_run(compared: ComparedRun, group: str = "") -> PageRun:
    """Return what a page shows of a run.

    Args:
        compared: the run.
        group: see `PageRun`.

    Raises:
        StoreError: if the store cannot be read.
    """
    curves = {key: curve for key in CURVES if (curve := compared.curve(key)) is not None}
    marks: dict[str, NDArray[np.int64]] = {}
    if compared.steps is not None:
        for kind, flag in (("skip", Flag.SKIPPED), ("overflow", Flag.OVERFLOW), ("clip", Flag.CLIPPED)):
            marks[kind] = compared.steps.step[(compared.steps.flags & flag.value) != 0]
    return PageRun(name=compared.run.name, group=group, curves=curves, events=compared.events, marks=marks)


def distinct_names(runs: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Return runs of which no two have one name: those that share one get the beginning of their id, or a number.

    Args:
        runs: in their order.
    """
    names = [each.run.name for each in runs]
    result = []
    for place, each in enumerate(runs):
        if names.count(each.run.name) > 1:
            ending = each.run.run_id[:6] if each.run.run_id else str(place + 1)
            each = ComparedRun(run=replace(each.run, name=f"{each.run.name} ({ending})"))
        result.append(each)
    return result
