"""``stabletrain report``: what happened in a run, what was found in it, and what to try next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from stabletrain.core.events import Event
from stabletrain.errors import UserError
from stabletrain.launch.bounded import one_message
from stabletrain.launch.recorded_run import RecordedRun, find_run
from stabletrain.launch.result import read_result
from stabletrain.launch.run_series import loss_history, series_of_run
from stabletrain.runtime.records.run_files import RESULT
from stabletrain.tracking.findings import SHOWN, findings, outcome
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
    run = find_run(wanted, command="report")
    series = series_of_run(run)
    check_loss(run, series)
    return "\n".join(_lines(run, series))


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


def _lines(run: RecordedRun, series: Series) -> Iterator[str]:
    identity = f" ({run.run_id[:8]})" if run.run_id else ""
    experiment = f", experiment {one_message(run.experiment, 100)}" if run.experiment else ""
    yield f"{one_message(run.name, 200)}{identity}{experiment}: {run.status}, {outcome(series, end_of(run))}"
    yield from (f"  {name:<11}{text}" for name, text in _numbers(run, series))
    yield ""
    yield from _finding_lines(series)
    events = list({event.to_json(): event for event in run.events()}.values())
    yield from _event_lines(events)


def _numbers(run: RecordedRun, series: Series) -> Iterator[tuple[str, str]]:
    """Rows with what was recorded, and the numbers that sum it up."""
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


def _counts(series: Series) -> Iterator[str]:
    if series.clipped is not None:
        yield f"clipped {series.clipped.sum() / series.steps:.1%}"
    for name, counts in (("skipped", series.skipped), ("overflows", series.overflow)):
        if counts is not None:
            yield f"{name} {counts.sum():.0f}"
    if series.rollbacks:
        batches = len(frozenset().union(*(each.excluded for each in series.rollbacks)))
        yield f"rollbacks {len(series.rollbacks)} ({batches} batches left out)"


def _finding_lines(series: Series) -> Iterator[str]:
    if not series.is_long_enough:
        yield f"no findings: {series.steps} steps are recorded, and at least {MIN_STEPS} are needed"
        return
    found = findings(series)
    if not found:
        yield "no findings"
        return
    more = f", the worst {SHOWN} of {len(found)}" if len(found) > SHOWN else ""
    yield f"findings{more} (hints, no diagnosis):"
    for number, each in enumerate(found[:SHOWN], 1):
        yield f"  {number}. {each.name}: {each.text}"
        yield f"     try: {each.advice}"
        yield f"     source: {each.source}"


def _event_lines(events: Sequence[Event]) -> Iterator[str]:
    done = [event for event in events if event.kind in _INTERVENTIONS]
    seen = [event for event in events if event.kind not in _INTERVENTIONS]
    if done:
        yield ""
        yield "interventions:"
        for event in done[:_LISTED]:
            word = _WORDS.get(event.kind, event.kind)
            yield f"  step {event.step:<6} {word:<9} {one_message(event.plugin, 50)}: {one_message(event.reason, 300)}"
        if len(done) > _LISTED:
            kinds = Counter(event.kind for event in done[_LISTED:])
            rest = ", ".join(f"{count} x {_WORDS.get(kind, kind)}" for kind, count in kinds.most_common())
            yield f"  and {len(done) - _LISTED} more, up to step {done[-1].step} (events.jsonl): {rest}"
    if seen:
        yield ""
        yield "reported:"
        for kind, count in Counter(one_message(event.kind, 50) for event in seen).most_common(10):
            first = next(event for event in seen if one_message(event.kind, 50) == kind)
            yield f"  {count} x {kind}, the first at step {first.step}: {one_message(first.reason, 300)}"
