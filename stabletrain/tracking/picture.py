"""``stability.png``: loss and gradient norm of every step of a run, and what the plugins did, in one picture."""

from __future__ import annotations

import importlib.util
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.runtime.records.json_lines import read_lines
from stabletrain.runtime.records.run_files import EVENTS, PICTURE, STEPS
from stabletrain.runtime.records.steps_file import Flag, Steps, read_steps

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BUCKETS = 1000
"""Each curve is drawn by the least and the greatest value of so many parts of the run, so that no extreme is lost."""
_MOST_LINES = 200
"""Rollbacks that are drawn."""
_WIDE = 30.0
"""Ratio of the greatest loss to the median from which on the axis is logarithmic."""


def draw(folder: Path, title: str = "") -> Path | None:
    """Draw the picture of a run into its folder.

    Args:
        folder: of the run.
        title: of the picture.

    Returns:
        The file; None if matplotlib is not installed, or no step was recorded.

    Raises:
        OSError: if a file cannot be read or written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logging.getLogger("stabletrain").debug("no %s: matplotlib is not installed", PICTURE)
        return None
    if not (folder / STEPS).is_file():
        return None
    steps = read_steps(folder / STEPS)
    if not len(steps.step):
        return None
    figure = _figure(steps, events_by_kind(folder, ("spike", "divergence", "rollback")), title)
    figure.savefig(folder / PICTURE, dpi=110)
    return folder / PICTURE


def events_by_kind(folder: Path, kinds: Iterable[str]) -> dict[str, list[int]]:
    """Return the attempted steps of a run's events, by kind; what is no event is left out.

    Args:
        folder: of the run.
        kinds: of the events.
    """
    found: dict[str, list[int]] = {kind: [] for kind in kinds}
    if not (folder / EVENTS).is_file():
        return found
    for line in read_lines(folder / EVENTS):
        kind, step = (line.record or {}).get("kind"), (line.record or {}).get("step")
        if isinstance(kind, str) and kind in found and isinstance(step, int):
            found[kind].append(step)
    return found


def _figure(steps: Steps, events: dict[str, list[int]], title: str) -> Any:
    import numpy as np
    from matplotlib.figure import Figure

    has_norm = bool(np.isfinite(steps.grad_norm).any())
    figure = Figure(figsize=(9, 5.5 if has_norm else 3.5), layout="constrained")
    panels = figure.subplots(2 if has_norm else 1, 1, sharex=True, squeeze=False)[:, 0]
    for panel, values, name in zip(panels, (steps.loss, steps.grad_norm), ("loss", "gradient norm"), strict=False):
        _curve(panel, steps, values, name)
        _marks(panel, steps, values, events, with_clips=name != "loss" or not has_norm)
        for step in events["rollback"][:_MOST_LINES]:
            panel.axvline(step, color="tab:purple", linewidth=1, alpha=0.6, label="rollback")
    panels[-1].set_xlabel("attempted step")
    first, last = int(steps.step[0]), int(steps.step[-1])
    panels[-1].set_xlim(first - 0.5, max(last, first + 1) + 0.5)
    panels[0].set_title(title.replace("$", r"\$"), fontsize=10, loc="left")
    by_label = {label: each for panel in panels for each, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if by_label:
        figure.legend(by_label.values(), by_label.keys(), loc="outside lower center", ncols=len(by_label), fontsize=9)
    return figure


def _curve(panel: Any, steps: Steps, values: NDArray[np.float64], name: str) -> None:
    import numpy as np

    finite = np.isfinite(values)
    xs, ys = _thinned(steps.step[finite], values[finite])
    panel.plot(xs, ys, color="tab:blue", linewidth=0.8)
    panel.set_ylabel(name)
    panel.grid(alpha=0.3)
    if len(ys) and ys.min() > 0 and (name != "loss" or ys.max() > _WIDE * np.median(ys)):
        panel.set_yscale("log")


def _marks(
    panel: Any, steps: Steps, values: NDArray[np.float64], events: dict[str, list[int]], with_clips: bool
) -> None:
    """What became of single steps; of a value that is not finite, at the upper edge."""
    import numpy as np

    kinds = {
        "clipped": (((steps.flags & Flag.CLIPPED) != 0) & with_clips, ".", "tab:green", 12),
        "spike or divergence": (np.isin(steps.step, events["spike"] + events["divergence"]), "^", "tab:orange", 36),
        "skipped": ((steps.flags & Flag.SKIPPED) != 0, "x", "tab:red", 30),
        "fp16 overflow": ((steps.flags & Flag.OVERFLOW) != 0, "+", "tab:gray", 30),
    }
    for label, (chosen, marker, color, size) in kinds.items():
        finite = chosen & np.isfinite(values)
        style = {"marker": marker, "color": color, "s": size, "linewidths": 1.2, "zorder": 3}
        xs, ys = _thinned(steps.step[finite], values[finite])
        if len(xs):
            panel.scatter(xs, ys, label=label, **style)
        lost, _ = _thinned(steps.step[chosen & ~finite], np.ones(int((chosen & ~finite).sum())))
        if len(lost):
            top = panel.get_xaxis_transform()
            panel.scatter(lost, np.full(len(lost), 0.97), label=label, transform=top, **style)


def _thinned(xs: NDArray[Any], ys: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The least and the greatest value of each part of the points, in their order."""
    import numpy as np

    if len(xs) <= 2 * _BUCKETS:
        return xs, ys
    edges = np.linspace(0, len(xs), _BUCKETS + 1).astype(int)
    parts = list(itertools.pairwise(edges))
    kept = {int(start + pick(ys[start:stop])) for start, stop in parts for pick in (np.argmin, np.argmax)}
    order = sorted(kept)
    return xs[order], ys[order]
