"""The result page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from json_lines import Record
from machine import measured

from fault_suite import reaches
from fault_suite.contenders import CONTENDERS, DEFAULT
from fault_suite.healthy_runs import HEALTHY_RUNS
from fault_suite.heat_map import ending, present
from fault_suite.judge import CEILING, LAST, NEAR, Cell, Results, verdict
from fault_suite.other_faults import OTHER_CONDITIONS, OTHER_FAULTS
from fault_suite.scenarios import (
    BATCH,
    CONDITIONS,
    HEALTHY,
    LENGTH,
    LR_WARMUP,
    RATE,
    SCENARIOS,
    Condition,
    Scenario,
)
from fault_suite.trial import EVERY, LOST

PEERS = tuple(each.name for each in CONTENDERS if each.is_peer)


def page(results: Results, healthy: Sequence[Record], command: str) -> str:
    """Return the whole page in Markdown."""
    names, absent = present(results)
    parts = [
        "# Faults: effect of each protection",
        _how(results, command),
        "## Damage",
        f"Loss above that of the fault-free twin, in nats x steps, mean of {len(results.seeds)} seeds; in brackets the "
        f"number of steps until the loss stays within {NEAR} nats of the twin's (of the slowest seed). **Bold**: not "
        f"every seed survived. First row: the held-out loss of the run without a fault, mean of its last {LAST} "
        "measurements, in nats per character.",
        _table(results, names, (HEALTHY, *SCENARIOS), _figure),
    ]
    if absent:
        parts.append(f"Not run: {', '.join(absent)}.")
    parts += [
        "## Other faults",
        f"At other times and of other kinds ({_spans(OTHER_CONDITIONS)}). Rows that end in *loss* show the held-out "
        "loss at the end instead of the damage.",
        _table(results, names, OTHER_FAULTS, _figure),
        "![damage](faults.png)",
        "## Reaches",
        reaches.table(reaches.reaches(results, healthy)),
        "## The rule",
        "The default stack must survive every fault. Its damage must be at most the largest of 1.15 times the damage "
        "of the best contender, that damage + 2, and two standard deviations over the fault-free seeds; by the same "
        "rule it must not exceed the damage without protection.",
        _rule(results, names),
        "## Held-out loss at the end",
        "Mean of the last 10 measurements and of the seeds, nats per character. The damage is measured from each "
        "contender's own run without the fault, so one that trains better without faults has more to lose; this table "
        "compares the contenders with each other.",
        _table(results, names, (HEALTHY, *SCENARIOS), lambda cell, _: _end(cell)),
        "## Batches wasted, and false positives",
        "Before the slash, attempted steps that were skipped or undone, mean of the seeds; after it, false positives "
        f"(skips and rollbacks outside the steps with the fault, at a loss less than {NEAR} nats above the twin's), "
        "sum of the seeds. Both are counted with Lightning's global step, which these contenders do not keep: "
        f"{', '.join(PEERS)}.",
        _table(results, [name for name in names if name not in PEERS], (HEALTHY, *SCENARIOS, *OTHER_FAULTS), _waste),
        "## Healthy runs of 2,000 steps",
        _healthy(healthy) if healthy else "Not run: add `--healthy`.",
        "## Contenders",
        "\n".join(f"- **{each.name}**{': ' + each.note if each.note else ''}" for each in CONTENDERS),
    ]
    return "\n\n".join(parts) + "\n"


def verdict_lines(results: Results, healthy: Sequence[Record]) -> str:
    """Return the tables of the rule and of the reaches, for the terminal."""
    names, _ = present(results)
    return f"{_rule(results, names)}\n\n{reaches.table(reaches.reaches(results, healthy))}"


def _how(results: Results, command: str) -> str:
    return (
        f"{measured()}; seeds {', '.join(map(str, results.seeds))}.\n\n    {command}\n\n"
        f"A character GPT of 2 layers and width 64 is trained on Shakespeare in batches of {BATCH} x {LENGTH}, with "
        f"AdamW at a learning rate of {RATE:g} after {LR_WARMUP} steps of warm-up ({_spans(CONDITIONS)}). Each fault "
        "is applied to a copy of one healthy run. From the fault on, the held-out loss is measured every "
        f"{EVERY} attempted steps (skipped and repeated steps included). The damage is the sum of the differences "
        f"from the loss of the fault-free twin with the same protection and seed, times {EVERY} steps; for the "
        "long-tailed run, from the same run with batches of one size. A loss above "
        f"{CEILING:g} nats counts as {CEILING:g}. A run without a finite loss for {LOST * EVERY} steps is ended."
    )


def _spans(conditions: Sequence[Condition]) -> str:
    return "; ".join(
        f"{c.name}: fault at {c.fault} of {c.steps} steps" + f" of {c.accumulate} micro-batches" * (c.accumulate > 1)
        for c in conditions
    )


def _table(
    results: Results, names: Sequence[str], scenarios: Sequence[Scenario], show: Callable[[Cell, Scenario], str]
) -> str:
    lines = ["| fault | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for scenario in scenarios:
        cells = [results.cell(name, scenario) for name in names]
        shown = ["" if cell is None else show(cell, scenario) for cell in cells]
        lines.append(f"| {scenario.name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _figure(cell: Cell, scenario: Scenario) -> str:
    if not cell.has_survived:
        return f"**{ending(cell.ended)}** ({cell.survived}/{cell.seeds})"
    if scenario.figure == "loss":
        return f"{cell.loss:.3f}"
    return f"{cell.damage:.1f} ({'never' if cell.recovered is None else cell.recovered})"


def _end(cell: Cell) -> str:
    return f"{cell.loss:.3f}" if cell.has_survived else f"**{ending(cell.ended)}**"


def _waste(cell: Cell, scenario: Scenario) -> str:
    return f"{cell.wasted:.0f} / {cell.false_positives}"


def _rule(results: Results, names: Sequence[str]) -> str:
    lines = [
        "| fault | best contender | best | without protection | 2 sd | allowed | damage | holds | holds without sd |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scenario in SCENARIOS:
        if results.cell(DEFAULT, scenario) is None:
            lines.append(f"| {scenario.name} | | | | | | not run | | |")
            continue
        found = verdict(results, scenario, names)
        if found is None:
            lines.append(f"| {scenario.name} | none survives | | | | | | **no** | **no** |")
            continue
        cell = results.cell(DEFAULT, scenario)
        damage = "did not survive" if cell is None or not cell.has_survived else f"{found.damage:.1f}"
        figures = [found.best_damage, found.nothing, 2 * found.spread, found.allowed]
        shown = " | ".join("-" if math.isnan(x) else f"{x:.1f}" for x in figures)
        answers = " | ".join("yes" if each else "**no**" for each in (found.holds, found.holds_strictly))
        lines.append(f"| {scenario.name} | {found.best} | {shown} | {damage} | {answers} |")
    return "\n".join(lines)


def _healthy(records: Sequence[Record]) -> str:
    lines = [
        "On the text without its rows of underscores: a window within such a row has a loss of 15 to 20 nats, so that "
        "its batch is correctly dropped, about once in 2,000 steps. The batches of the long-tailed run contain 1 to 64 "
        "windows.\n",
        "| contender | run | seed | skips | rollbacks | ended |",
        "|---|---|---|---|---|---|",
    ]
    order = {(condition.name, seed): i for i, (condition, seed, _) in enumerate(HEALTHY_RUNS)}
    for r in sorted(records, key=lambda r: (r["contender"], order.get((r["condition"], r["seed"]), 99))):
        where = f" (first at {r['skips'][0]})" if r["skips"] else ""
        lines.append(
            f"| {r['contender']} | {r['condition']} | {r['seed']} | {len(r['skips'])}{where} | {len(r['rollbacks'])} "
            f"| {r['ended'] or 'completed'} |"
        )
    return "\n".join(lines)
