"""``stabletrain sweep``: ask Optuna for values, run them in a new worker, tell Optuna how that ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stabletrain.config.compose import Composed, compose, expand
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.search_space import Dimension
from stabletrain.config.validate import check_keys
from stabletrain.core import metric_names
from stabletrain.errors import UserError
from stabletrain.extras import require
from stabletrain.launch.launcher import FinishedJob, Job, LaunchRequest, Reporter, check_jobs, run_jobs
from stabletrain.launch.mlflow_run import is_tracked
from stabletrain.launch.other_nodes import has_other_nodes
from stabletrain.launch.study import TRIAL_ENV, Goal, State, Study, Trial, default_storage, storage_address
from stabletrain.launch.sweep_run import SweepRun
from stabletrain.launch.trial_end import no_such_metric, state_of

_FIXED = frozenset({"recipe", "run_dir", "resume", "dry_run", "memory"})
"""Keys that are the same for a whole sweep."""
_STARTUP = 5
"""Complete trials before the first that may be pruned: Optuna's own default."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The options of ``sweep``.

    Args:
        space: what varies.
        goal: what is looked for.
        trials: how many to run now, besides those that the study has.
        at_once: how many at a time.
        study: name of the study; None: after recipe and keys.
        storage: database of the studies; None: ``optuna.db`` beside MLflow's.
        prune: whether to stop trials that are worse than the median.
    """

    space: tuple[Dimension, ...]
    goal: Goal
    trials: int = 20
    at_once: int = 1
    study: str | None = None
    storage: str | None = None
    prune: bool = True

    def __post_init__(self) -> None:
        for name, value in (("--trials", self.trials), ("--jobs", self.at_once)):
            if value < 1:
                raise UserError(f"sweep: {name}: expected at least 1, got {value}")
        if not self.goal.metric.strip():
            raise UserError("sweep: expected the name of a metric, such as --minimise val/loss, got an empty one")


@dataclass(frozen=True, kw_only=True)
class FinishedTrial:
    """One trial and what Optuna was told about it.

    Args:
        shown: its values.
        state: as told.
        value: of the objective; None unless it is complete.
        why: of one that is not complete.
        job: the run.
    """

    shown: str
    state: State
    value: float | None
    why: str
    job: FinishedJob


@dataclass(kw_only=True)
class Search:
    """A sweep that has been prepared.

    Args:
        request: recipe and overrides.
        recipe: as typed.
        options: of the sweep.
        study: opened.
        finished: the trials of this sweep, in the order in which they ended.
    """

    request: LaunchRequest
    recipe: str
    options: SearchOptions
    study: Study
    finished: list[FinishedTrial] = field(default_factory=list)
    _running: dict[int, Trial] = field(default_factory=dict)

    def run(self, report: Reporter, told: Callable[[FinishedTrial], None]) -> list[FinishedJob]:
        """Run the trials, and return the runs.

        Args:
            report: called when a trial starts.
            told: called when one has ended.

        Raises:
            UserError: if no run logs the objective.
        """

        def when_done(done: FinishedJob) -> None:
            told(self._tell(done))

        try:
            sweep = SweepRun(self.request.command, self.name, self.options.trials, self.options.goal.metric)
            at_once = self.options.at_once
            return run_jobs(self.request, self._jobs(), report, sweep=sweep, at_once=at_once, when_done=when_done)
        finally:
            for number in list(self._running):
                self.study.tell(number, "failed")

    @property
    def name(self) -> str:
        """The name of the run above the trials: what varies."""
        return f"{self.recipe}: {' × '.join(str(each) for each in self.options.space)}"

    def _jobs(self) -> Iterator[Job]:
        for _ in range(self.options.trials):
            trial = self.study.ask()
            self._running[trial.number] = trial
            overrides = (*self.request.overrides, *trial.words)
            alone = LaunchRequest(recipe=self.recipe, overrides=overrides, trust=self.request.trust)
            yield Job(
                recipe=self.recipe,
                composed=compose(self.recipe, list(overrides)),
                command=alone.command,
                number=trial.number,
                name=f"trial {trial.number}: {trial.shown}",
                environment=self._environment(trial) if self.options.prune else {},
            )

    def _environment(self, trial: Trial) -> dict[str, str]:
        told = {"storage": self.study.address, "study": self.study.name, "trial": trial.id}
        return {TRIAL_ENV: json.dumps({**told, "metric": self.options.goal.metric, "startup": _STARTUP})}

    def _tell(self, done: FinishedJob) -> FinishedTrial:
        assert done.number is not None
        assert done.result is not None
        trial, metric = self._running[done.number], self.options.goal.metric
        name = metric_names.find(metric, done.result.metrics)
        value = None if name is None else done.result.metrics[name]
        state, why = state_of(done.config, done.result, value)
        logger = done.config.get("logger")
        notes = {"end": done.result.end, "run_dir": done.config["run_dir"], "why": why[:500]}
        if isinstance(logger, Mapping) and logger.get("run_id"):
            notes["run_id"] = logger["run_id"]
        self.study.tell(done.number, state, value if state == "complete" else None, **notes)
        del self._running[done.number]
        if done.result.end == "finished" and name is None:
            raise no_such_metric(metric, done.result.metrics)
        told = FinishedTrial(
            shown=trial.shown, state=state, value=value if state == "complete" else None, why=why, job=done
        )
        self.finished.append(told)
        return told


def prepare_search(request: LaunchRequest, options: SearchOptions) -> Search:
    """Check recipe and space, and open the study.

    Args:
        request: recipe and overrides, without sweeps.
        options: of the sweep.

    Raises:
        ConfigError: with every mistake in the config, also at the bounds of the space.
        UserError: if the study cannot be used, or is of another sweep.
        StartFailed: if the user's own code fails, or the process died.
    """
    require("optuna", "sweep")
    ((recipe, overrides),) = expand(
        request.recipe, request.overrides, multirun=False, advice="vary the key with --over"
    )
    keys = {each.key.replace("/", ".") for each in options.space}
    given = [word for word in overrides if word.partition("=")[0].lstrip("+~").replace("/", ".") in keys]
    if given:
        raise UserError(f"sweep: {given[0]}: --over varies this key; give it once")
    if fixed := sorted(keys & _FIXED):
        raise UserError(f"sweep: --over {fixed[0]}=...: expected a key that training depends on; leave this one out")
    composed = compose(recipe, overrides)
    if composed.config["dry_run"]:
        raise UserError("sweep: the trials train; remove dry_run, or use stabletrain validate")
    if composed.config["launch"]["kind"] == "slurm" or has_other_nodes(composed.config):
        raise UserError(
            "sweep: the trials run on this machine, one after the other or with --jobs; choose launch=local"
        )
    if composed.config["resume"] is not None:
        raise UserError("sweep: every trial begins with new weights; remove resume")
    _check_space(composed, recipe, overrides, options, request)
    name = options.study or f"{composed.recipe}/{','.join(each.key for each in options.space)}"
    study = Study(
        storage_address(options.storage) if options.storage else default_storage(_tracking_uri(composed.config)),
        name=name,
        space=options.space,
        goal=options.goal,
        config=composed.config,
        seed=composed.config["seed"],
    )
    request = replace(request, recipe=recipe, overrides=tuple(overrides), multirun=True)
    return Search(request=request, recipe=recipe, options=options, study=study)


def _check_space(
    composed: Composed, recipe: str, overrides: list[str], options: SearchOptions, request: LaunchRequest
) -> None:
    """Find an unknown key, or a bound that the recipe refuses, before the first trial: build the space's corners."""
    problems: list[Problem] = []
    jobs = []
    for corner in range(max(len(each.corners) for each in options.space)):
        words = [f"{each.key}={each.corners[min(corner, len(each.corners) - 1)]}" for each in options.space]
        found = compose(recipe, [*overrides, *words])
        problems += check_keys(found)
        jobs.append(Job(recipe=recipe, composed=found, number=corner, name=None))
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    check_jobs(jobs, request)


def _tracking_uri(config: Mapping[str, Any]) -> str | None:
    from stabletrain.tracking.store import absolute_uri, default_tracking_uri

    if not is_tracked(config):
        return None
    wanted = config["logger"].get("tracking_uri")
    return absolute_uri(wanted) if isinstance(wanted, str) and wanted else default_tracking_uri()
