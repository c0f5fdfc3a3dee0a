"""Whether the loss of a run that has ended diverged, from what the run recorded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from stabletrain.errors import UserError
from stabletrain.launch.recorded_run import RecordedRun, find_run
from stabletrain.launch.result import Result
from stabletrain.runtime.records.run_files import STEPS
from stabletrain.runtime.records.steps_file import read_steps

_LOSSES = ("stability/loss", "train/loss")
_FEWEST = 2
_LEAST_RISE = 0.25
"""Of the first loss: a rate that is too low for the run's length leaves the loss where it was, give or take noise."""


def has_diverged(config: Mapping[str, Any], result: Result) -> bool:
    """Return whether the loss at a run's end is not finite, or above that at its start.

    Args:
        config: the content of run.yaml.
        result: how the run ended.
    """
    if any(not math.isfinite(result.metrics[name]) for name in _LOSSES if name in result.metrics):
        return True
    return ends_above_start(_recorded_losses(config))


def ends_above_start(losses: Sequence[float]) -> bool:
    """Return whether the last twentieth of the losses is not finite for the most part, or well above the first.

    Args:
        losses: in the order of the steps; a NaN or infinity is a step whose loss was not finite.

    >>> ends_above_start([4.0, 3.0, 2.0, 1.0]), ends_above_start([4.0, 3.0, 2.0, 9.0])
    (False, True)
    """
    if len(losses) < _FEWEST:
        return False
    width = max(1, len(losses) // 20)
    end = losses[-width:]
    if sum(not math.isfinite(loss) for loss in end) > width / 2:
        return True
    # of one step only: at a rate that is far too high the second loss has diverged already
    first = next((loss for loss in losses[:-width] if math.isfinite(loss)), None)
    if first is None:
        return False
    return median(loss for loss in end if math.isfinite(loss)) - first > _LEAST_RISE * abs(first)


def _recorded_losses(config: Mapping[str, Any]) -> list[float]:
    """The loss of every step, or the means that were logged; empty if neither was recorded."""
    folder = Path(config["run_dir"])
    try:
        steps = [float(loss) for loss in read_steps(folder / STEPS).loss]
    except OSError:
        steps = []
    return steps or _logged_losses(folder)


def _logged_losses(folder: Path) -> list[float]:
    try:
        run: RecordedRun = find_run(str(folder), command="sweep")
        histories = (run.history(name) for name in _LOSSES)
        return [value for _, value in next(filter(None, histories), [])]
    except UserError:  # the store fails: what is not known is no divergence
        return []
