"""Pictures of a landscape, by matplotlib: the planes from above, the same as surfaces, and the curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stabletrain.landscape.planes import Grid
from stabletrain.landscape.results import Landscape

PLANES, SURFACES, CURVATURE = "planes.png", "surfaces.png", "curvature.png"

_DECADES = 1e6
"""Ratio of the highest to the lowest loss that is drawn; what is higher would hide the shape around the weights."""
_WIDE = 10.0
"""Ratio from which on the colours are logarithmic."""
_LEVELS = 18
_COLOURS = "YlGnBu"
"""Light where the loss is low, so that the path and the star are visible there."""
_DPI = 100
"""A picture is 800 pixels wide."""


class Drawn(NamedTuple):
    """Losses as they are drawn.

    Args:
        losses: all finite.
        low: the lowest one.
        high: the highest one.
        is_log: whether the scale is logarithmic.
        clipped: points that are drawn lower than they are, or are not finite.
    """

    losses: list[list[float]]
    low: float
    high: float
    is_log: bool
    clipped: int


def drawn(grid: Grid) -> Drawn | None:
    """Clip the losses of a grid to what can be drawn; None if none is finite.

    Args:
        grid: the loss on a plane.
    """
    finite = grid.finite
    if not finite:
        return None
    low, high = finite[0], finite[-1]
    if low > 0:
        high = min(high, low * _DECADES)
    elif high > 0:  # a loss that may be negative, such as that of a density
        middle = finite[len(finite) // 2]
        high = min(high, middle + 1e3 * max(middle - low, 1e-12))
    losses = [[min(loss, high) if math.isfinite(loss) else high for loss in row] for row in grid.losses]
    clipped = sum(not loss <= high for row in grid.losses for loss in row)
    clipped += sum(loss == -math.inf for row in grid.losses for loss in row)
    return Drawn(losses, low, high, low > 0 and high > _WIDE * low, clipped)


def clipping(result: Landscape) -> list[str]:
    """Sentences about points of which the pictures do not show the value.

    Args:
        result: computed.
    """
    found = []
    for name, grid in (("random plane", result.random), ("plane of the checkpoints", result.path)):
        shown = None if grid is None else drawn(grid)
        if grid is not None and shown is None:
            found.append(f"{name}: the loss is not finite at any of its points, so it is not drawn")
        elif grid is not None and shown is not None and shown.clipped:
            points = sum(map(len, grid.losses))
            found.append(
                f"{name}: at {shown.clipped} of {points} points the loss is above {shown.high:.3g} or not finite "
                f"({grid.overflows} points); the pictures show {shown.high:.3g} there, the JSON has the values"
            )
    return found


def draw(result: Landscape, folder: Path, *, surface: bool = False) -> list[Path]:
    """Draw a landscape; the files are replaced.

    Args:
        result: computed.
        folder: exists.
        surface: also as surfaces.

    Returns:
        The files.

    Raises:
        OSError: if one cannot be written.
    """
    figures = {PLANES: _planes(result, _from_above)}
    if surface:
        figures[SURFACES] = _planes(result, _as_surface, projection="3d")
    if any(each.curvature is not None and each.curvature.largest is not None for each in result.checkpoints):
        figures[CURVATURE] = _curvature(result)
    files = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=_DPI)
            files.append(folder / name)
    return files


def _planes(result: Landscape, panel: Callable[..., None], projection: str | None = None) -> Any:
    from matplotlib.figure import Figure

    grids = [("random plane, filter-normalised", result.random, False)]
    if result.path is not None and result.shares is not None:
        first, second = result.shares
        title = f"plane of {len(result.checkpoints)} checkpoints ({first:.1%} + {second:.1%} of variance)"
        grids.append((title, result.path, True))
    shown = [(title, grid, drawn(grid), path) for title, grid, path in grids if grid is not None]
    shown = [each for each in shown if each[2] is not None]
    if not shown:
        return None
    figure = Figure(figsize=(8, 3.9 if len(shown) > 1 else 5.5), layout="constrained")
    figure.suptitle(_plain(result.name), fontsize=10)
    for number, (title, grid, what, path) in enumerate(shown, start=1):
        axes = figure.add_subplot(1, len(shown), number, projection=projection)
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.locator_params(nbins=6)
        panel(figure, axes, grid, what, result if path else None)
        if what is not None and what.clipped:
            axes.set_xlabel(f"{what.clipped} points above {what.high:.2g} or not finite: clipped", fontsize=8)
    return figure


def _levels(what: Drawn) -> list[float]:
    if what.high <= what.low:
        return [what.low - 1e-6 - abs(what.low) * 1e-6, what.low + 1e-6 + abs(what.low) * 1e-6]
    parts = [index / (_LEVELS - 1) for index in range(_LEVELS)]
    if what.is_log:
        found = [what.low * (what.high / what.low) ** part for part in parts]
    else:
        found = [what.low + (what.high - what.low) * part for part in parts]
    return [what.low, *found[1:-1], what.high]


def _digits(what: Drawn) -> int:
    """Significant digits with which neighbouring ticks of the colour bar differ."""
    step, largest = (what.high - what.low) / (_LEVELS / 2), max(abs(what.low), abs(what.high))
    if what.is_log or step <= 0:
        return 2
    return min(max(math.ceil(math.floor(math.log10(largest)) - math.log10(step)) + 1, 2), 7)


def _norm(what: Drawn) -> Any:
    from matplotlib.colors import LogNorm, Normalize

    return (LogNorm if what.is_log else Normalize)(vmin=what.low, vmax=what.high)


def _from_above(figure: Any, axes: Any, grid: Grid, what: Drawn, result: Landscape | None) -> None:
    levels = _levels(what)
    colours = axes.contourf(
        grid.xs, grid.ys, what.losses, levels=levels, cmap=_COLOURS, norm=_norm(what), extend="both"
    )
    axes.contour(grid.xs, grid.ys, what.losses, levels=levels, colors="black", linewidths=0.3, alpha=0.6)
    bar = figure.colorbar(colours, ax=axes, format=f"%.{_digits(what)}g", shrink=0.9)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("loss (log scale)" if what.is_log else "loss", fontsize=8)
    style = {"color": "crimson", "markeredgecolor": "white"}
    if result is not None:
        places = [each.place for each in result.checkpoints if each.place is not None]
        xs, ys = zip(*places, strict=True)
        axes.plot(xs, ys, "o-", linewidth=1.4, markersize=4, markeredgewidth=0.5, label="checkpoints", **style)
    axes.plot(0, 0, "*", markersize=15, markeredgewidth=0.8, label="final weights", **style)
    axes.legend(fontsize=7, loc="upper right", framealpha=0.85)


def _as_surface(figure: Any, axes: Any, grid: Grid, what: Drawn, result: Landscape | None) -> None:
    import numpy as np

    heights = np.log10(np.array(what.losses)) if what.is_log else np.array(what.losses)
    xs, ys = np.meshgrid(grid.xs, grid.ys)
    axes.plot_surface(xs, ys, heights, cmap=_COLOURS, rcount=100, ccount=100, linewidth=0.15, edgecolor="0.35")
    axes.set_zlabel("log10 of the loss" if what.is_log else "loss", fontsize=8)
    axes.view_init(elev=42, azim=-60)
    axes.set_box_aspect(None, zoom=0.85)  # or the label of the height is cut off
    axes.locator_params(nbins=5)
    if result is not None:
        found = [(*each.place, each.loss_in_plane) for each in result.checkpoints if each.place is not None]
        path = [(x, y, _height(z, what)) for x, y, z in found]
        axes.plot(*zip(*path, strict=True), "o-", color="crimson", linewidth=1.4, markersize=3, zorder=10)
        axes.plot(*([each] for each in path[-1]), "*", color="crimson", markersize=13, zorder=11)


def _height(loss: float | None, what: Drawn) -> float:
    loss = what.high if loss is None or not math.isfinite(loss) else max(what.low, min(loss, what.high))
    return math.log10(loss) if what.is_log else loss


def _curvature(result: Landscape) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="eigenvalue of the Hessian")
    found = [(each.step, each.curvature) for each in result.checkpoints if each.curvature is not None]
    curves: Sequence[tuple[str, str, list[tuple[int, float | None]]]] = (
        ("largest", "tab:blue", [(step, each.largest) for step, each in found]),
        ("smallest", "tab:orange", [(step, each.smallest) for step, each in found]),
    )
    highest = 1e-12
    for label, colour, points in curves:
        known = [(step, value) for step, value in points if value is not None]
        if known:
            steps, values = zip(*known, strict=True)
            axes.plot(steps, values, "o-", color=colour, markersize=4, label=label)
            highest = max(highest, *map(abs, values))
    limits = [(e.step, e.limit) for e in result.checkpoints if e.limit is not None and e.limit.value is not None]
    if limits:
        bounds = [each.value or 0.0 for _, each in limits]
        label = f"{limits[-1][1].rule}: {limits[-1][1].optimizer.partition(',')[0]} is stable below"
        axes.plot([step for step, _ in limits], bounds, "--", color="crimson", label=label, drawstyle="steps-post")
        highest = max(highest, *bounds)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_yscale("symlog", linthresh=max(1e-3 * highest, 1e-12))
    axes.set_ylim(top=3 * highest)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(_plain(result.name), fontsize=10)
    return figure


def _plain(text: str) -> str:
    """A name as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")
