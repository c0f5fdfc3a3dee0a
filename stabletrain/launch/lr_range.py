"""``stabletrain lr-range``: a run of its own in a new worker, whose learning rate rises until the loss does."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stabletrain.config.compose import Composed, compose, expand
from stabletrain.config.problems import ConfigError
from stabletrain.config.validate import check_keys
from stabletrain.core.lr_range import FEWEST_STEPS, RangePoint, RangeResult, read_range
from stabletrain.errors import UserError
from stabletrain.launch.launcher import FinishedJob, Job, LaunchRequest
from stabletrain.launch.run_end import PURPOSE
from stabletrain.runtime.records.lr_range_file import read_lr_range
from stabletrain.runtime.records.run_files import LR_RANGE

_SCHEDULE = "stabletrain_plugins.schedule_lr.lr_range.LRRange"
_PROTECTIONS = ("clip", "nonfinite", "outliers")
"""Slots of the default stack that stay on, but for the run without it."""
_OFF = ("spike", "averaging", "stopping", "overfitting", "checkpoints")
"""Slots that go back, set the rate, need a validation, or would save weights that nobody wants."""
_ENDS_RUNS = ("EarlyStopping", "ModelCheckpoint", "LearningRateFinder", "BatchSizeFinder", "StochasticWeightAveraging")
"""Lightning's callbacks that need a validation, set the rate, or train on their own."""


@dataclass(frozen=True, kw_only=True)
class RangeOptions:
    """The options of ``lr-range``.

    Args:
        start: learning rate of the first step.
        stop: of the last step.
        steps: between them.
        both: whether to run a second time without the default stack.
    """

    start: float = 1e-6
    stop: float = 1.0
    steps: int = 200
    both: bool = False

    def __post_init__(self) -> None:
        for name, value in (("--from", self.start), ("--to", self.stop)):
            if not 0 < value < math.inf:
                raise UserError(f"lr-range: {name}: expected a learning rate above 0, got {value!r}")
        if not self.start < self.stop:
            raise UserError(
                f"lr-range: expected --from below --to, got {self.start!r} and {self.stop!r}; exchange them"
            )
        if self.steps < FEWEST_STEPS:
            raise UserError(f"lr-range: --steps: expected at least {FEWEST_STEPS}, got {self.steps}")


def prepare_range(request: LaunchRequest, options: RangeOptions) -> list[Job]:
    """Compose the run, or the two runs, of a range test.

    Args:
        request: recipe and overrides, without sweeps.
        options: of the test.

    Raises:
        ConfigError: with every mistake in the config.
        UserError: if the recipe cannot be tested so.
    """
    ((recipe, overrides),) = expand(
        request.recipe, request.overrides, multirun=False, advice="a range test has one; give one value"
    )
    composed = compose(recipe, overrides)
    problems = check_keys(composed)
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    if composed.config["dry_run"]:
        raise UserError("lr-range: a range test trains; remove dry_run, or use stabletrain validate")
    if composed.config["resume"] is not None:
        raise UserError("lr-range: the test begins with new weights; remove resume")
    if composed.config["launch"]["kind"] == "slurm":
        raise UserError("lr-range: the test waits for its run, which is on this machine; choose launch=local")
    slots = {bare: [f"plugins/{slot}" for slot in (*_OFF, *(_PROTECTIONS if bare else ()))] for bare in (False, True)}
    kinds = ["with the default stack", "without the default stack"] if options.both else [None]
    return [
        Job(
            recipe=recipe,
            composed=replace(
                composed,
                config=range_config(composed, options, bare=number == 1),
                choices={**composed.choices, **dict.fromkeys(slots[number == 1], "none"), "schedule": "lr-range"},
            ),
            tags={PURPOSE: "lr-range"},
            command=request.command,
            number=number if options.both else None,
            name="lr-range" if kind is None else f"lr-range {kind}",
        )
        for number, kind in enumerate(kinds)
    ]


def range_config(composed: Composed, options: RangeOptions, *, bare: bool) -> dict[str, Any]:
    """Return the config of a recipe's range test.

    The model, the data, the optimizer and, unless ``bare``, clipping and skipping are the recipe's.

    Args:
        composed: the recipe.
        options: of the test.
        bare: whether to leave out the default stack.
    """
    config = copy.deepcopy(composed.config)  # opening a run writes its id into it
    off = {*_OFF, *(_PROTECTIONS if bare else ())}
    optimizer = config["optimizer"]
    rate = optimizer.get("lr") if isinstance(optimizer, Mapping) else None
    test = {"max_steps": options.steps, "max_epochs": -1, "min_epochs": None, "min_steps": None, "max_time": None}
    test |= {"limit_val_batches": 0, "num_sanity_val_steps": 0, "enable_checkpointing": False}
    return {
        **config,
        "schedule": {
            "_target_": _SCHEDULE,
            "start": options.start,
            "stop": options.stop,
            "steps": options.steps,
            "base": float(rate) if isinstance(rate, int | float) and rate > 0 else None,
        },
        "plugins": {slot: None if slot in off else node for slot, node in config["plugins"].items()},
        "callbacks": {name: node for name, node in config["callbacks"].items() if not _ends_runs(node)},
        "trainer": {**config["trainer"], **test},
    }


def _ends_runs(node: object) -> bool:
    return isinstance(node, Mapping) and str(node.get("_target_")).rpartition(".")[2] in _ENDS_RUNS


@dataclass(frozen=True, kw_only=True)
class RangeRun:
    """One run of a range test.

    Args:
        title: what distinguishes it; empty for a single one.
        points: every attempted step.
        result: what they show.
        job: how the run ended.
    """

    title: str
    points: tuple[RangePoint, ...]
    result: RangeResult
    job: FinishedJob

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.job.config["run_dir"])


def read_ranges(jobs: list[Job], finished: list[FinishedJob]) -> list[RangeRun]:
    """Return what the runs of a range test have recorded.

    Args:
        jobs: from `prepare_range`.
        finished: those that ran.
    """
    runs = []
    for job, done in zip(jobs, finished, strict=False):
        points = tuple(read_lr_range(Path(done.config["run_dir"]) / LR_RANGE))
        title = "" if job.number is None else str(job.name).removeprefix("lr-range ")
        runs.append(RangeRun(title=title, points=points, result=read_range(points), job=done))
    return runs
