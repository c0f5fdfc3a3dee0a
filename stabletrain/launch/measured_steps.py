"""``stabletrain plan --measure``: train some steps of a run in a folder of their own, and extrapolate."""

from __future__ import annotations

import copy
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stabletrain.core.step_times import FEWEST, WARM_UP, quartiles
from stabletrain.errors import UserError
from stabletrain.launch.bounded import read_json
from stabletrain.launch.launcher import Job, LaunchRequest, Reporter, run
from stabletrain.launch.other_nodes import has_other_nodes
from stabletrain.launch.run_again import NO_LOGGER
from stabletrain.launch.start_up import StartFailed
from stabletrain.planning.plan import Measured, Plan
from stabletrain.runtime.records.run_files import STEP_TIMES

_CALLBACK = "measure_steps"
_TARGET = "stabletrain.runtime.records.measure_steps.MeasureSteps"
_OFF = ("checkpoints", "stopping", "overfitting")
"""Slots of plugins that write checkpoints or need a validation."""
_NEED_VALIDATION = ("EarlyStopping", "ModelCheckpoint")
"""Lightning's callbacks of this kind."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """The options of ``plan`` about measuring.

    Args:
        steps: to measure; None: none.
        price: of a device for an hour, in any currency; None: unknown.
    """

    steps: int | None = None
    price: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < FEWEST:
            raise UserError(f"plan: --measure: expected at least {FEWEST} steps, got {self.steps}")
        if self.price is not None and not 0 < self.price < math.inf:
            raise UserError(f"plan: --price: expected a price of a device for an hour, above 0, got {self.price:g}")
        if self.price is not None and self.steps is None:
            raise UserError("plan: --price needs the time of a step: add --measure 20")


def check_measurable(jobs: list[Job]) -> None:
    """Refuse jobs whose steps cannot be measured by this command.

    Args:
        jobs: of the request.

    Raises:
        UserError: if there are several, or if one is not run by this machine alone.
    """
    if len(jobs) > 1:
        raise UserError(f"plan: --measure is for one run at a time, got {len(jobs)} jobs; give one value of each key")
    config = jobs[0].composed.config
    if config["launch"]["kind"] == "slurm" or has_other_nodes(config):
        raise UserError(
            "plan: --measure trains on this machine alone, and this run is for others; choose launch=local or "
            "launch=torchrun with launch.nodes=1"
        )


def with_measured_steps(
    jobs: Sequence[Job],
    request: LaunchRequest,
    plans: Sequence[tuple[Plan | None, str | None]],
    options: MeasureOptions,
) -> list[tuple[Plan | None, str | None]]:
    """The plans with measured steps; what the processes print meanwhile goes to standard error.

    Args:
        jobs: from `check_measurable`.
        request: the arguments of the command.
        plans: of the jobs; one without a plan is not measured.
        options: with ``steps``.
    """
    with _output_to_errors():
        return [
            (None if plan is None else measure(job, request, plan, options), why)
            for job, (plan, why) in zip(jobs, plans, strict=True)
        ]


def measure(job: Job, request: LaunchRequest, plan: Plan, options: MeasureOptions) -> Plan:
    """Train some steps of a planned run, with its plugins, data and processes, and add what follows from their time.

    Nothing is kept: it runs in a temporary folder, without tracking, checkpoints and validation.

    Args:
        job: with its config.
        request: the arguments of the command.
        plan: of the run.
        options: with ``steps``.

    Raises:
        UserError: if the run ends before there is anything to measure.
        StartFailed: if it fails.
    """
    assert options.steps is not None
    with tempfile.TemporaryDirectory(prefix="stabletrain-plan-") as folder:
        config = measured_config(job.composed.config, options.steps, Path(folder) / "run")
        composed = replace(job.composed, config=config)
        (done,) = run(request, [replace(job, composed=composed)], _Silent())
        found = _read(Path(config["run_dir"]) / STEP_TIMES)
        result = done.result
    if result is not None and result.end in ("failed", "killed"):  # the traceback is printed already
        raise StartFailed(f"error: plan: --measure: the run has failed: {result.message}")
    if found is None or len(found["seconds"]) < FEWEST:
        how = "" if result is None or result.end == "finished" else f" ({result.end}: {result.message})"
        count = 0 if found is None else len(found["seconds"])
        raise UserError(
            f"plan: --measure: the run has ended after {WARM_UP} steps to warm up and {count} measured ones{how}; at "
            f"least {FEWEST} are needed: leave --measure out, or let it have more steps"
        )
    return replace(plan, measured=forecast(plan, found, options.price))


def measured_config(config: Mapping[str, Any], steps: int, folder: Path) -> dict[str, Any]:
    """The config of the steps that are measured. The run's own length stays, and with it schedules and lengths.

    Args:
        config: of the run.
        steps: to measure.
        folder: of the run that is measured.
    """
    config = copy.deepcopy(dict(config))
    quiet = {"limit_val_batches": 0, "num_sanity_val_steps": 0}
    quiet |= dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    others = {name: node for name, node in config["callbacks"].items() if not _needs_validation(node)}
    return {
        **config,
        "dry_run": False,
        "resume": None,
        "run_dir": str(folder),
        "logger": NO_LOGGER,
        "plugins": {slot: None if slot in _OFF else node for slot, node in config["plugins"].items()},
        "callbacks": {**others, _CALLBACK: {"_target_": _TARGET, "steps": steps}},
        "trainer": {**config["trainer"], **quiet},
        "launch": {**config["launch"], "restarts": 0},
    }


def forecast(plan: Plan, found: Mapping[str, Any], price: float | None) -> Measured:
    """What the measured steps say about the whole run.

    Args:
        plan: of the run.
        found: from ``step_times.json``.
        price: of a device for an hour; None: unknown.
    """
    seconds = found["seconds"]
    low, median, high = quartiles(seconds)
    devices = plan.processes * plan.nodes
    hours = None if plan.steps is None else plan.steps * median / 3600
    peak, flops = found["peak_flops"], plan.flops_per_step
    return Measured(
        steps=len(seconds),
        seconds=median,
        low=low,
        high=high,
        device=found["device"],
        peak_flops=peak,
        hours=hours,
        mfu=flops / median / (peak * devices) if peak and flops else None,
        price=price,
        cost=None if hours is None or price is None else hours * devices * price,
    )


def _needs_validation(node: object) -> bool:
    return isinstance(node, Mapping) and str(node.get("_target_")).rpartition(".")[2] in _NEED_VALIDATION


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def _output_to_errors() -> Iterator[None]:
    """Let processes that start meanwhile print to standard error, so that standard output is the plan alone."""
    sys.stdout.flush()
    try:
        before = os.dup(1)
    except OSError:  # standard output is closed
        yield
        return
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)


class _Silent(Reporter):
    """Says nothing: what is printed is the plan."""

    def note(self, text: str) -> None:
        """Say nothing."""
