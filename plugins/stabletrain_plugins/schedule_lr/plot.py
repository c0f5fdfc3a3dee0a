"""Plot of a learning-rate curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stabletrain.core.curves import Curve
from stabletrain.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(curve: Curve, steps: int, base: float | None, title: str, path: str | Path | None) -> Figure:
    """Draw a curve, at about 2000 steps or fewer.

    Args:
        curve: the learning rate as a share of the base rate.
        steps: length of the run in applied steps.
        base: the base rate; None: draw the shares.
        title: of the figure.
        path: file for the figure; its suffix is the format. None: save nothing.

    Returns:
        The matplotlib figure.
    """
    require("matplotlib", "ScheduleLR.plot")
    from matplotlib.figure import Figure

    xs = sorted({*range(0, steps, max(1, steps // 2000)), steps - 1})
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="applied steps", ylabel="x base rate" if base is None else "learning rate")
    axes.plot(xs, [(1.0 if base is None else base) * curve.factor(x) for x in xs])
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, steps)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    if path is not None:
        figure.savefig(path)
    return figure
