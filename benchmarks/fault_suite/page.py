"""The result page and its plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from machine import measured

from fault_suite.contenders import CONTENDERS, DEFAULT, OURS
from fault_suite.harness import EVERY, LOST, LR_WARMUP, RATE, Record
from fault_suite.judge import CEILING, NEAR, Cell, Results, verdict
from fault_suite.scenarios import BATCH, CONDITIONS, HEALTHY_RUNS, LENGTH, PLAIN, SCENARIOS


def page(results: Results, healthy: Sequence[Record], command: str) -> str:
    """Return the whole page in Markdown."""
    names, absent = present(results)
    parts = [
        "# Faults: effect of each protection",
        _how(results, command),
        "## Damage",
        f"Loss above that of the fault-free twin, in nats x steps, mean of {len(results.seeds)} seeds; in brackets the "
        f"number of steps until the loss stays within {NEAR} nats of the twin's (of the slowest seed). **Bold**: not "
        "every seed survived.",
        _table(results, names, _damage),
    ]
    if absent:
        parts.append(f"Not run: {', '.join(absent)}.")
    parts += [
        "![damage](faults.png)",
        "## The rule",
        "The default stack must survive every fault. Its damage must be at most the largest of 1.15 times the damage "
        "of the best contender, that damage + 2, and two standard deviations over the fault-free seeds; by the same "
        "rule it must not exceed the damage without protection.",
        _rule(results, names),
        "## Batches wasted, and false positives",
        "Before the slash, attempted steps that were skipped or undone, mean of the seeds; after it, false positives "
        f"(skips and rollbacks outside the steps with the fault, at a loss less than {NEAR} nats above the twin's), "
        "sum of the seeds.",
        _table(results, names, _waste),
        "## Healthy runs of 2,000 steps",
        _healthy(healthy) if healthy else "Not run: add `--healthy`.",
        "## Contenders",
        "\n".join(f"- **{each.name}**{': ' + each.note if each.note else ''}" for each in CONTENDERS),
    ]
    return "\n\n".join(parts) + "\n"


def present(results: Results) -> tuple[list[str], list[str]]:
    """Return the names of contenders with records of all seeds in a scenario, and of the others."""
    there = [each.name for each in CONTENDERS if any(results.cell(each.name, s) is not None for s in SCENARIOS)]
    return there, [each.name for each in CONTENDERS if each.name not in there]


def verdict_lines(results: Results) -> str:
    """Return the table of the rule, for the terminal."""
    names, _ = present(results)
    return _rule(results, names)


def _how(results: Results, command: str) -> str:
    spans = "; ".join(f"{c.name}: fault at {c.fault} of {c.steps} steps" for c in CONDITIONS)
    return (
        f"{measured()}; seeds {', '.join(map(str, results.seeds))}.\n\n    {command}\n\n"
        f"A character GPT of 2 layers and width 64 is trained on Shakespeare in batches of {BATCH} x {LENGTH}, with "
        f"AdamW at a learning rate of {RATE:g} after {LR_WARMUP} steps of warm-up ({spans}). Each fault is applied to "
        "a copy of one healthy run, by `stabletrain.chaos`. From the fault on, the held-out loss is measured every "
        f"{EVERY} attempted steps (skipped and repeated steps included). The damage is the sum of the differences "
        f"from the loss of the fault-free twin with the same protection and seed, times {EVERY} steps; for the "
        "long-tailed run, from the same run with batches of one size. A loss above "
        f"{CEILING:g} nats counts as {CEILING:g}. A run without a finite loss for {LOST * EVERY} steps is ended."
    )


def _table(results: Results, names: Sequence[str], show: Callable[[Cell], str]) -> str:
    lines = ["| fault | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for scenario in SCENARIOS:
        cells = [results.cell(name, scenario) for name in names]
        lines.append(f"| {scenario.name} | " + " | ".join("" if cell is None else show(cell) for cell in cells) + " |")
    return "\n".join(lines)


def _damage(cell: Cell) -> str:
    if not cell.has_survived:
        return f"**{_short(cell.ended)}** ({cell.survived}/{cell.seeds})"
    return f"{cell.damage:.1f} ({'never' if cell.recovered is None else cell.recovered})"


def _short(ended: str) -> str:
    kind = ended.split(" ", 1)[0].rstrip(":")
    return {"TrainingStopped": "stopped", "TrainingSpikeException": "raised", "not": "NaN"}.get(kind, kind)


def _waste(cell: Cell) -> str:
    return f"{cell.wasted:.0f} / {cell.false_positives}"


def _rule(results: Results, names: Sequence[str]) -> str:
    lines = [
        "| fault | best contender | best | without protection | 2 sd | allowed | damage | holds | holds without sd |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for scenario in SCENARIOS:
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


def plot(results: Results, target: Path) -> None:
    """Plot the damage of every contender in every scenario; runs that did not survive are at the right edge."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names, _ = present(results)
    figure, ax = plt.subplots(figsize=(10, 0.42 * len(SCENARIOS) + 1.6), layout="constrained")
    edge = 2500.0
    marks = dict(zip(names, "xvs^dPoDh*X", strict=False))
    for i, name in enumerate(names):
        color = "tab:green" if name == DEFAULT else ("tab:blue" if name in OURS else "tab:red")
        ys, xs, alive = [], [], []
        for y, scenario in enumerate(SCENARIOS):
            cell = results.cell(name, scenario)
            if cell is not None:
                ys.append(y + 0.06 * (i - len(names) / 2))
                xs.append(max(-2.0, cell.damage) if cell.has_survived else edge)
                alive.append(cell.has_survived)
        size = 70 if name == DEFAULT else 28
        ax.scatter(xs, ys, size, color=color, marker=marks[name], alpha=0.75, label=name, linewidths=0.8)
    ax.set_xscale("symlog", linthresh=2.0)
    ax.axvline(edge, color="0.8", zorder=0)
    ax.set_xlim(-3, 1.6 * edge)
    ax.set_xticks([0, 2, 10, 100, 1000, edge], ["0", "2", "10", "100", "1000", "died"])
    ax.set_yticks(range(len(SCENARIOS)), [scenario.name for scenario in SCENARIOS])
    ax.invert_yaxis()
    ax.grid(axis="x", color="0.9")
    ax.set_xlabel(
        f"damage, nats x steps above the fault-free twin in {PLAIN.steps - PLAIN.fault} steps (mean of the seeds)"
    )
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(target, dpi=120)
    plt.close(figure)
