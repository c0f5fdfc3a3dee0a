"""The result page, and the lines for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from machine import measured

from harm_suite.judge import HARMED, UNCLEAR, Results, Verdict, learns
from harm_suite.stacks import NOTHING, Stack
from harm_suite.training import Case

RULE = """\
Without protection and with it, the same seed gives the same weights, data and random numbers, and a run ends after the
same number of attempted steps, so that a run with skipped steps sees as many batches. The metric is that of the trained
module on held-out data, or on known truth; lower is better. A protection **harms** a case if

- one of its runs ends by an exception or before its last step, or has no finite metric at its end; or
- the mean over the seeds of the paired differences, metric with protection - metric without, is above *all* of: two
  standard errors of these differences; two standard errors of the metric without protection (its standard deviation
  over the seeds, divided by the root of their number); and `least`, a constant of the case, below which a difference
  does not matter to anybody.

*Unclear* is a mean above the second and the third, but not above the first: one seed is harmed and another is not, and
more seeds are needed."""
HELD_OUT = """\
A case with `*` is held out for acceptance: constants of the rules were not chosen on it, see
[its package](../harm_suite/cases/held_out/__init__.py)."""


def page(results: Results, cases: Sequence[Case], stacks: Sequence[Stack], command: str) -> str:
    """Return the whole page in Markdown, of the runs that there are."""
    compared = [each for each in stacks if each.name != NOTHING]
    parts = [
        "# Harm: does protection cost healthy trainings anything?",
        f"{measured()}; seeds {', '.join(map(str, results.seeds))}.\n\n    {command}",
        RULE,
        "## Harmed",
        summary(results, cases, stacks),
        "## Metric",
        f"Mean of the seeds; before: of the module before training. **Bold**: harmed; ?: unclear. {HELD_OUT}",
        _metrics(results, cases, compared),
    ]
    for stack in compared:
        rows = _interventions(results, cases, stack)
        if rows:
            parts += [f"## {stack.name}", f"{stack.note}. {COLUMNS}", rows]
    parts += ["## Cases", "\n".join(f"- **{_name(case)}**: {case.text}" for case in cases)]
    return "\n\n".join(parts) + "\n"


COLUMNS = (
    "Limit: the difference from which on it is harm. Worst seed: the metric without and with protection. Skipped, "
    "rollbacks, accepted and stops are sums of the seeds; clipped is the share of the attempted steps."
)


def summary(results: Results, cases: Sequence[Case], stacks: Sequence[Stack]) -> str:
    """Return how many cases each protection harms, and which, with the shared and the held-out ones apart."""
    lines = [
        "| protection | cases | harmed of shared | harmed of held out | unclear | stops | which |",
        "|" + "---|" * 7,
    ]
    for stack in stacks:
        found = {case: results.verdict(case.name, stack.name) for case in cases if stack.name != NOTHING}
        judged = {case: verdict for case, verdict in found.items() if verdict is not None}
        if not judged:
            continue
        harmed = [case for case, verdict in judged.items() if verdict.answer == HARMED]
        unclear = [case for case, verdict in judged.items() if verdict.answer == UNCLEAR]
        counts = []
        for part in (False, True):
            of = sum(case.is_held_out == part for case in judged)
            counts.append(f"{sum(case.is_held_out == part for case in harmed)} of {of}")
        stops = sum(verdict.stops for verdict in judged.values())
        names = ", ".join([*map(_name, harmed), *(f"{_name(case)} (unclear)" for case in unclear)])
        lines.append(f"| {stack.name} | {len(judged)} | {' | '.join(counts)} | {len(unclear)} | {stops} | {names} |")
    unlearned = [case for case in cases if results.runs(case.name, NOTHING) and not _learns(results, case)]
    if unlearned:
        lines += ["", f"Not trainings, since the bare run does not learn: {', '.join(map(_name, unlearned))}."]
    return "\n".join(lines)


def _metrics(results: Results, cases: Sequence[Case], stacks: Sequence[Stack]) -> str:
    lines = [f"| case | before | bare | {' | '.join(each.name for each in stacks)} |", "|" + "---|" * (3 + len(stacks))]
    for case in cases:
        bare = results.runs(case.name, NOTHING)
        if not bare:
            continue
        cells = [_number(_mean([each[key] for each in bare])) for key in ("before", "metric")]
        cells += [_marked(results.verdict(case.name, each.name)) for each in stacks]
        lines.append(f"| {_name(case)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _interventions(results: Results, cases: Sequence[Case], stack: Stack) -> str:
    lines = [
        "| case | bare | with | difference | limit | worst seed | harm | skipped | clipped | rollbacks | accepted "
        "| stops |",
        "|" + "---|" * 12,
    ]
    for case in cases:
        v = results.verdict(case.name, stack.name)
        if v is not None:
            figures = [_number(x) for x in (v.bare, v.metric, v.difference, v.limit)]
            worst = f"{_number(v.worst[0])}, {_number(v.worst[1])}"
            answer = f"**{v.answer}**" if v.answer == HARMED else v.answer
            counts = [v.skipped, f"{v.clipped:.1%}", v.rollbacks, v.accepted, v.stops]
            lines.append(f"| {' | '.join(map(str, [_name(case), *figures, worst, answer, *counts]))} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _marked(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    number = _number(verdict.metric)
    return {HARMED: f"**{number}**", UNCLEAR: f"{number} ?"}.get(verdict.answer, number)


def _learns(results: Results, case: Case) -> bool:
    return learns(results.runs(case.name, NOTHING))


def _mean(values: Sequence[float | None]) -> float:
    return sum(float("nan") if x is None else x for x in values) / len(values)


def _name(case: Case) -> str:
    return case.name.replace("_", " ") + " *" * case.is_held_out


def _number(value: float) -> str:
    return f"{value:.3g}"
