"""The result page of benchmarks/early_warning.py."""

from __future__ import annotations

import statistics
import string
from collections.abc import Iterable, Sequence

from json_lines import Record
from machine import measured

from early_warning_suite import claims, judge
from early_warning_suite.readings import READINGS
from early_warning_suite.results import Results
from early_warning_suite.settings import PARTS, SEEDS, TROUBLED
from early_warning_suite.unions import FIXED, OWN, UNIONS, Union

LETTERS = dict(zip((each.name for each in TROUBLED), string.ascii_lowercase, strict=False))

INTRODUCTION = f"""Small networks (transformers, an LSTM, a ReLU RNN, a CNN with batch norm) on real text and digits,
each trained for 300 steps in fp32. Fourteen kinds of trouble, three seeds. The loss **has risen** at the first of
{judge.LASTS} steps in a row whose {judge.MEAN_OF}-step mean is {judge.RISE} nats above the lowest such mean, or at the
step that ends the run because loss or gradient norm are not finite. The readings are those that
`MonitorActivations(attention="exact")` and `MonitorGradients(update_ratio=True, rms_t=True, spectral_norm=True)` log
with `every=1`, of the worst layer; the trainings are bit-identical without them. Sharpness, and what is computed from
loss and gradient norm, are the benchmark's own. Each reading is judged in two ways, both of which need two steps in a
row:

- **fixed limit**: {judge.FACTOR} times the largest value (from step {judge.FROM_STEP} on) of two runs each of eight
  healthy settings;
- **own history**: 6 robust standard deviations above the median of its own values from 60 to 10 steps ago.

An alarm **leads** if it comes {judge.LEAD} steps or more before the loss has risen, and not before its cause begins. A
**false alarm** is one in a healthy run: of the *seen* settings, from which the limits come, with other seeds; or of
eight *unseen* ones, which play no part in the limits."""


def page(results: Results, command: str) -> str:
    """The whole page.

    Args:
        results: of the runs so far.
        command: that makes them.
    """
    ran = {part: len(results.part(part)) for part in PARTS}
    planned = {part: len(PARTS[part]) * len(SEEDS[part]) for part in PARTS}
    counts = ", ".join(f"{part} {ran[part]} of {planned[part]}" for part in PARTS)
    parts = [
        "# Early warning: which reading moves before the loss does?",
        f"{measured()}. Runs: {counts}; the loss rose in {len(results.risen)} of those with trouble.",
        f"    {command}",
        INTRODUCTION,
        "## What the cards may claim",
        claims.sentences(results),
        "## All readings together",
        _unions(results),
        "## Detectors of the loss",
        "Steps from the rise of the loss to the first report after its cause began, for each seed; negative: earlier; "
        "`-`: none. `spike` is a report of a single step, `divergence` and `slow rise` say that the loss is up.",
        _detectors(results),
        "## Lead of each reading, fixed limit",
        "Median lead in steps where all runs of a kind lead (**bold**), else in how many; empty: none leads; `n/a`: "
        "the runs do not have the reading. Led: of all runs. False: healthy runs with an alarm, of those with it.",
        _leads(results, FIXED),
        "## Lead of each reading, own history",
        _leads(results, OWN),
        "## Kinds of trouble",
        _kinds(results),
        "## Alarms in healthy runs of unseen settings, fixed limit",
        _unseen(results),
        "## Compared with the first measurement",
        claims.compared(results),
    ]
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def _unions(results: Results) -> str:
    rows = []
    for each in UNIONS:
        led, of = results.led(each)
        false = (results.false(part, each) for part in ("seen", "unseen"))
        rows.append((each.name, each.by, f"{led} of {of}", *(f"{found} of {runs}" for found, runs in false)))
    return table(("readings", "limit", f"runs led by {judge.LEAD} steps or more", "false: seen", "false: unseen"), rows)


def _detectors(results: Results) -> str:
    columns = (
        ("`detect_spikes`, any", "detect_spikes", ()),
        ("its divergences and slow rises", "detect_spikes", ("divergence", "slow rise", "nonfinite")),
        ("slow-rise rule alone", "slow_rise", ()),
        ("`skip_outliers`", "skip_outliers", ()),
    )
    rows: list[Sequence[object]] = []
    for setting in TROUBLED:
        runs = [each for each in results.kind(setting.name) if each["risen"] is not None]
        if runs:
            cells = (
                ", ".join(_steps(results.after(run, detector, kinds)) for run in runs) for _, detector, kinds in columns
            )
            rows.append((setting.name, ", ".join(str(run["risen"]) for run in runs), *cells))
    found = ["**found**", f"{len(results.risen)} runs"]
    for _, detector, kinds in columns:
        steps = [step for run in results.risen if (step := results.after(run, detector, kinds)) is not None]
        text = f"{len(steps)}; median {statistics.median(steps):g}, worst {max(steps)}" if steps else "0"
        found.append(f"{text}; {sum(step <= 20 for step in steps)} by 20 steps after")
    rows.append(found)
    for part in ("calibration", "seen", "unseen"):
        healthy = results.healthy(part)
        false = (
            sum(any(not kinds or kind in kinds for _, kind in run[detector]) for run in healthy)
            for _, detector, kinds in columns
        )
        rows.append((f"*healthy runs reported, {part}*", f"{len(healthy)} runs", *false))
    return table(("runs", "loss has risen at", *(name for name, _, _ in columns)), rows)


def _leads(results: Results, by: str) -> str:
    rows = []
    for reading in READINGS:
        cells = [_cell(results, results.kind(setting.name), reading.key, by) for setting in TROUBLED]
        alone = Union(reading.name, [reading.key], by)
        led, of = results.led(alone)
        false = (results.false(part, alone) for part in ("seen", "unseen"))
        limit = results.limits[reading.key]
        middle = [("-" if limit is None else f"{limit:.3g}")] if by == FIXED else []
        counts = (f"{found} of {runs}" if runs else "n/a" for found, runs in false)
        rows.append((reading.name, *middle, *cells, f"{led} of {of}", *counts))
    head = ("reading", *(["limit"] if by == FIXED else []), *LETTERS.values(), "led", "false: seen", "false: unseen")
    return table(head, rows)


def _cell(results: Results, runs: Sequence[Record], reading: str, by: str) -> str:
    risen = [each for each in runs if each["risen"] is not None]
    if not any(results.has(each, reading) for each in runs):
        return "n/a"
    led = [results.lead(each, [reading], by) for each in risen if results.leads(each, [reading], by)]
    if risen and len(led) == len(risen):
        return f"**{statistics.median(lead for lead in led if lead is not None):g}**"
    return f"{len(led)} of {len(risen)}" if led else ""


def _kinds(results: Results) -> str:
    rows = []
    for setting in TROUBLED:
        runs = results.kind(setting.name)
        losses = ", ".join("{:.3g} {:.3g} {:.3g}".format(*run["loss"]) for run in runs)
        rows.append(
            (LETTERS[setting.name], setting.name, setting.start, ", ".join(_risen(run) for run in runs), losses)
        )
    head = ("", "trouble", "cause begins", "loss has risen at", "loss at first, lowest and last (10-step mean)")
    return table(head, rows)


def _unseen(results: Results) -> str:
    rows = []
    for run in results.part("unseen"):
        fired = [
            f"{each.name} ({_times(results, run, each.key)})"
            for each in READINGS
            if results.is_false(run, [each.key], FIXED)
        ]
        if run["risen"] is None:
            rows.append((run["setting"], run["seed"], f"{run['loss'][2]:.3g}", "; ".join(fired) or "none"))
    return table(("setting", "seed", "last loss", "alarms (largest value over the limit)"), rows)


def _times(results: Results, run: Record, reading: str) -> str:
    largest, limit = run["readings"][reading]["before"], results.limits[reading]
    return f"x{largest / limit:.2g}" if largest and limit else "-"


def _risen(run: Record) -> str:
    return "never" if run["risen"] is None else str(run["risen"])


def _steps(value: int | None) -> str:
    return "-" if value is None else str(value)
