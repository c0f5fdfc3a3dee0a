"""The plot of a learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from stabletrain.errors import UserError
from stabletrain.extras import require
from stabletrain.launch.lr_range import RangeRun


def draw_ranges(runs: Sequence[RangeRun], path: Path) -> None:
    """Draw the loss over the learning rate, and the two rates of each run.

    Args:
        runs: at least one.
        path: of the file; its suffix is the format.

    Raises:
        UserError: if matplotlib is not installed, or the file cannot be written.
    """
    require("matplotlib", "the plot of lr-range")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="training loss", xscale="log")
    for number, run in enumerate(runs):
        colour, smoothed, found = f"C{number}", run.result.smoothed, run.result
        finite = [point for point in run.points if math.isfinite(point.loss)]
        axes.plot([p.rate for p in finite], [p.loss for p in finite], color=colour, alpha=0.3, linewidth=0.8)
        axes.plot([p.rate for p in smoothed], [p.loss for p in smoothed], color=colour, label=run.title or "smoothed")
        for rate, style, word in ((found.steepest, "--", "steepest"), (found.below_turning, ":", "turning / 10")):
            if rate is not None:
                label = f"{word}: {rate:.2g}" + (f" ({run.title})" if run.title else "")
                axes.axvline(rate, color=colour, linestyle=style, linewidth=1, label=label)
    losses = [point.loss for run in runs for point in run.result.smoothed]
    if losses:
        low, high = min(losses), max(losses)
        first = max(run.result.smoothed[0].loss for run in runs if run.result.smoothed)
        top = min(high, first + 0.5 * (first - low))  # what diverges would hide the descent
        margin = 0.05 * (top - low) or 0.1
        axes.set_ylim(low - margin, top + margin)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(f"{runs[0].job.recipe}: learning-rate range test")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise UserError(f"lr-range: cannot write {path} ({error}); choose another file with --plot") from None
