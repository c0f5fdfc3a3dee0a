"""The plot of the result page: the damage of every fault with every contender."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from fault_suite.contenders import CONTENDERS, DEFAULT
from fault_suite.judge import Cell, Results
from fault_suite.other_faults import OTHER_FAULTS
from fault_suite.scenarios import SCENARIOS, Scenario

LINEAR, LARGEST = 2.0, 200.0
"""The colour scale is linear up to the first damage and logarithmic up to the second."""
LOST = "0.25"


def plot(results: Results, names: Sequence[str], target: Path) -> None:
    """Draw a cell per fault and contender: its number is the damage, or how the run ended.

    Args:
        results: all records.
        names: the contenders, from left to right.
        target: the picture's file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import SymLogNorm

    groups = [[s for s in group if s.figure == "damage"] for group in (SCENARIOS, OTHER_FAULTS)]
    groups = [[s for s in group if any(results.cell(name, s) for name in names)] for group in groups]
    rows: list[Scenario] = [scenario for group in groups for scenario in group]
    cells = [[results.cell(name, scenario) for name in names] for scenario in rows]
    figure, ax = plt.subplots(figsize=(4.6 + 0.62 * len(names), 2.2 + 0.3 * len(rows)), layout="constrained")
    colours = plt.get_cmap("RdYlGn_r").copy()
    colours.set_bad(LOST)
    values = [[_colour(cell) for cell in row] for row in cells]
    image = ax.imshow(values, cmap=colours, norm=SymLogNorm(LINEAR, vmin=0, vmax=LARGEST), aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            if cell is None:
                ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color="white"))
                continue
            red, green, blue, _ = colours(image.norm(values[y][x]))
            colour = "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.45 else "black"
            weight = "bold" if names[x] == DEFAULT else "normal"
            ax.text(x, y, label(cell), ha="center", va="center", fontsize=7.5, color=colour, weight=weight)
    ax.set_xticks(range(len(names)), names, rotation=35, ha="left", rotation_mode="anchor", fontsize=8.5)
    ax.set_yticks(range(len(rows)), [scenario.name for scenario in rows], fontsize=8.5)
    ax.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    ax.set_xticks([x - 0.5 for x in range(1, len(names))], minor=True)
    ax.set_yticks([y - 0.5 for y in range(1, len(rows))], minor=True)
    ax.tick_params(which="minor", length=0)
    ax.grid(which="minor", color="white", linewidth=1)
    ax.spines[:].set_visible(False)
    if all(groups):
        ax.axhline(len(groups[0]) - 0.5, color="black", linewidth=1.2)
    bar = figure.colorbar(image, ax=ax, shrink=0.6, pad=0.015, extend="both")
    bar.set_ticks([0, 2, 5, 10, 20, 50, 100, 200], labels=["0", "2", "5", "10", "20", "50", "100", "200"])
    bar.ax.minorticks_off()
    bar.set_label("damage, nats x steps", fontsize=8.5)
    seeds = ", ".join(map(str, results.seeds))
    figure.suptitle(
        "Damage by each fault with each protection\n"
        f"held-out loss above the fault-free twin's, summed over steps (seeds {seeds}); grey: a run did not survive",
        fontsize=10,
    )
    figure.savefig(target, dpi=120)
    plt.close(figure)


def label(cell: Cell) -> str:
    """Return the number or the word in a cell."""
    if not cell.has_survived:
        return ending(cell.ended)
    shown = f"{cell.damage:.0f}" if abs(cell.damage) >= 100 else f"{cell.damage:.1f}"
    return "0.0" if shown == "-0.0" else shown


def ending(ended: str) -> str:
    """Return one word for the reason why a run ended early."""
    kind = ended.split(" ", 1)[0].rstrip(":")
    return {"TrainingStopped": "stopped", "TrainingSpikeException": "raised", "not": "NaN"}.get(kind, kind)


def present(results: Results) -> tuple[list[str], list[str]]:
    """Return the names of contenders with records of all seeds in a scenario, and of the others."""
    rows = (*SCENARIOS, *OTHER_FAULTS)
    there = [each.name for each in CONTENDERS if any(results.cell(each.name, s) is not None for s in rows)]
    return there, [each.name for each in CONTENDERS if each.name not in there]


def _colour(cell: Cell | None) -> float:
    return math.nan if cell is None or not cell.has_survived else min(max(0.0, cell.damage), LARGEST)
