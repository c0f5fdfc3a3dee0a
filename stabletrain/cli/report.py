"""``stabletrain report``: what happened in a run, what was found in it, and what to try next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stabletrain.core.events import Event
from stabletrain.errors import UserError
from stabletrain.launch.attempts import read_attempts_file
from stabletrain.launch.bounded import one_message
from stabletrain.launch.recorded_run import RecordedRun, find_run
from stabletrain.launch.result import read_result
from stabletrain.launch.run_series import loss_history, series_of_run
from stabletrain.runtime.records.run_files import ATTEMPTS, RESULT
from stabletrain.tracking.findings import SHOWN, Finding, findings, outcome
from stabletrain.tracking.series import MIN_STEPS, Series, median

_INTERVENTIONS = ("skip", "overflow", "rollback", "accept", "rewarm", "announced", "stop")
"""Kinds of events that are something that was done; the others were seen only."""
_LISTED = 30
"""Interventions that are listed, at most."""
_WORDS = {"announced": "change", "rewarm": "warm-up"}


def report(wanted: str) -> str:
    """Return what happened in a run, its interventions, and the findings, as text.

    Args:
        wanted: its folder, id, the beginning of an id, or its name.

    Raises:
        UserError: if there is no such run, or it has no training loss.
    """
    return "\n".join(read_report(wanted).lines())


def read_report(wanted: str) -> RunReport:
    """Find a run, and return the report of it; see `report`.

    Args:
        wanted: the run.

    Raises:
        UserError: see `report`.
    """
    run = find_run(wanted, command="report")
    series = series_of_run(run)
    check_loss(run, series)
    return RunReport(run=run, series=series)


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What there is to say about a run.

    Args:
        run: from `find_run`.
        series: what it has recorded.
    """

    run: RecordedRun
    series: Series

    @cached_property
    def title(self) -> str:
        """Name, id, experiment, status and outcome in a line."""
        run = self.run
        identity = f" ({run.run_id[:8]})" if run.run_id else ""
        experiment = f", experiment {one_message(run.experiment, 100)}" if run.experiment else ""
        end = outcome(self.series, end_of(run))
        return f"{one_message(run.name, 200)}{identity}{experiment}: {run.status}, {end}"

    @cached_property
    def numbers(self) -> Sequence[tuple[str, str]]:
        """Rows with what was recorded, and the numbers that sum it up."""
        return list(_numbers(self.run, self.series))

    @cached_property
    def findings(self) -> Sequence[Finding]:
        """All findings, the worst first."""
        return findings(self.series)

    @cached_property
    def summary(self) -> str:
        """How many findings there are, or why there are none."""
        if not self.series.is_long_enough:
            return f"no findings: {self.series.steps} steps are recorded, and at least {MIN_STEPS} are needed"
        if not self.findings:
            if self.run.unread:
                return (
                    f"no findings in the folder alone: the run's metrics are in {self.run.unread}, which is read if "
                    "MLFLOW_TRACKING_URI names it"
                )
            return "no findings"
        more = f", the worst {SHOWN} of {len(self.findings)}" if len(self.findings) > SHOWN else ""
        return f"findings{more} (hints, no diagnosis):"

    @cached_property
    def done(self) -> Sequence[Event]:
        """The events that are interventions, in order."""
        return [event for event in self._events if event.kind in _INTERVENTIONS]

    @cached_property
    def seen(self) -> Sequence[Event]:
        """The other events, in order."""
        return [event for event in self._events if event.kind not in _INTERVENTIONS]

    @cached_property
    def _events(self) -> Sequence[Event]:
        """Without those that a resumed run has written again."""
        return list({event.to_json(): event for event in self.run.events()}.values())

    def lines(self) -> Iterator[str]:
        """The report as text, line by line."""
        yield self.title
        yield from (f"  {name:<11}{text}" for name, text in self.numbers)
        yield ""
        yield self.summary
        for number, each in enumerate(self.findings[:SHOWN], 1):
            yield f"  {number}. {each.name}: {each.text}"
            yield f"     try: {each.advice}"
            yield f"     source: {each.source}"
        yield from _done_lines(self.done)
        yield from _seen_lines(self.seen)


def check_loss(run: RecordedRun, series: Series) -> None:
    """Raise an error if a run has no training loss that a report could be about.

    Args:
        run: from `find_run`.
        series: what it has recorded.

    Raises:
        UserError: if it has none, or a metric that is never finite.
    """
    name = one_message(run.name, 200)
    if not len(series.step):
        known = ", ".join(one_message(each, 100) for each in sorted(run.metrics)[:10]) or "no metrics"
        raise UserError(
            f"report: {name} has no training loss; expected steps.bin, or a metric such as stability/loss or "
            f"train/loss, got {known}"
        )
    if run.steps() is None and not np.isfinite(series.loss).any():
        raise UserError(
            f"report: {name} has no finite training loss: the metric {loss_history(run)[0]} has {len(series.step)} "
            "values, and all of them are NaN or infinite; report a run with a loss"
        )


def end_of(run: RecordedRun) -> str:
    """How a run ended, for `outcome`: as in its result.json, else MLflow's status.

    Args:
        run: from `find_run`.
    """
    path = None if run.status == "RUNNING" else run.file(RESULT)
    result = None if path is None else read_result(path.parent)
    return run.status if result is None else result.end


def _numbers(run: RecordedRun, series: Series) -> Iterator[tuple[str, str]]:
    source = "steps.bin" if run.steps() is not None else loss_history(run)[0]
    if series.every > 1:
        yield "steps", f"{len(series.step)} values of {one_message(source, 100)}, one for each {series.every} steps"
    else:
        yield "steps", f"{len(series.step)} attempted, from {one_message(source, 100)}"
    finite = np.isfinite(series.loss)
    if series.mixed:
        yield "loss", "several optimizers, each with its own: no curve"
    elif finite.any():
        losses, steps, curve = series.loss[finite], series.step[finite], series.curve
        first, end = median(losses[:5]), median(losses[-max(5, len(losses) // 20) :])
        if curve is not None and not series.changes:  # the numbers of the findings
            first, end = curve.first, curve.end
        yield (
            "loss",
            f"{first:.4g} at first, {losses.min():.4g} lowest (step {steps[losses.argmin()]}), {end:.4g} at the end",
        )
    at, values = series.validation
    good = np.isfinite(values)
    if good.any():
        at, values = at[good], values[good]
        yield "validation", f"{values.min():.4g} lowest (step {at[values.argmin()]}), {values[-1]:.4g} at the end"
    if series.grad_norm is not None and (good := np.isfinite(series.grad_norm)).any():
        norms, steps = series.grad_norm[good], series.step[good]
        yield "grad_norm", f"{median(norms):.3g} median, {norms.max():.3g} largest (step {steps[norms.argmax()]})"
    if series.lr is not None:
        yield "rate", f"{series.peak_lr:.3g} peak, {series.lr[-1]:.3g} at the end"
    yield "counts", ", ".join(_counts(series)) or "nothing clipped, skipped or rolled back is recorded"
    attempts = read_attempts_file(path) if (path := run.file(ATTEMPTS)) is not None else []
    if len(attempts) > 1:
        died = ", ".join(str(each.step) for each in attempts[:-1][-_LISTED:])
        lost = sum(each.steps_lost for each in attempts)
        yield "attempts", f"{len(attempts)}; all but the last ended at steps {died}; {lost} steps were made again"


def _counts(series: Series) -> Iterator[str]:
    if series.clipped is not None:
        yield f"clipped {series.clipped.sum() / series.steps:.1%}"
    for name, counts in (("skipped", series.skipped), ("overflows", series.overflow)):
        if counts is not None:
            yield f"{name} {counts.sum():.0f}"
    if series.rollbacks:
        batches = len(frozenset().union(*(each.excluded for each in series.rollbacks)))
        yield f"rollbacks {len(series.rollbacks)} ({batches} batches left out)"


def _done_lines(done: Sequence[Event]) -> Iterator[str]:
    if not done:
        return
    yield ""
    yield "interventions:"
    for event in done[:_LISTED]:
        word = _WORDS.get(event.kind, event.kind)
        yield f"  step {event.step:<6} {word:<9} {one_message(event.plugin, 50)}: {one_message(event.reason, 300)}"
    if len(done) > _LISTED:
        kinds = Counter(event.kind for event in done[_LISTED:])
        rest = ", ".join(f"{count} x {_WORDS.get(kind, kind)}" for kind, count in kinds.most_common())
        yield f"  and {len(done) - _LISTED} more, up to step {done[-1].step} (events.jsonl): {rest}"


def _seen_lines(seen: Sequence[Event]) -> Iterator[str]:
    if not seen:
        return
    yield ""
    yield "reported:"
    for kind, count in Counter(one_message(event.kind, 50) for event in seen).most_common(10):
        first = next(event for event in seen if one_message(event.kind, 50) == kind)
        yield f"  {count} x {kind}, the first at step {first.step}: {one_message(first.reason, 300)}"
