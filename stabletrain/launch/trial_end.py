"""What a run's end means for the sweep that it is a trial of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError, did_you_mean
from stabletrain.launch.outcome_tag import outcome_of
from stabletrain.launch.result import Result
from stabletrain.launch.study import State

_LOSSES = ("stability/loss", "train/loss")


def state_of(config: Mapping[str, Any], result: Result, value: float | None) -> tuple[State, str]:
    """Return what Optuna is told about a run, and why.

    Args:
        config: the content of run.yaml.
        result: how it ended.
        value: of the objective; None if it was not logged.
    """
    if result.end == "stopped":
        return "pruned", result.message
    if result.end != "finished" or value is None:
        return "failed", result.message if result.end != "finished" else "the objective was not logged"
    if not math.isfinite(value):
        return "pruned", f"the objective is {value}"
    if has_diverged(config, result):
        return "pruned", f"the loss diverged; the objective is {value:.4g}"
    return "complete", ""


def has_diverged(config: Mapping[str, Any], result: Result) -> bool:
    """Return whether the loss of a run that has ended diverged.

    Args:
        config: the content of run.yaml.
        result: how it ended.
    """
    if any(not math.isfinite(result.metrics[name]) for name in _LOSSES if name in result.metrics):
        return True
    uri = (config.get("logger") or {}).get("tracking_uri")  # the launcher has written the store's address into it
    return outcome_of(Path(config["run_dir"]), result, uri) == "diverged"


def no_such_metric(metric: str, logged: Mapping[str, float]) -> UserError:
    """The error for an objective that a run has not logged.

    Args:
        metric: the objective.
        logged: the run's metrics.
    """
    known = ", ".join(sorted(logged)) or "nothing"
    return UserError(
        f"sweep: no run logs {metric!r}{did_you_mean(metric, logged)}; choose another objective. The run has logged: "
        f"{known}"
    )
