"""From a command line to finished runs: compose, validate, make the folder, create the MLflow run, start the worker.

Hydra runs in this process only, not in the worker: Lightning starts the processes of a distributed run by repeating the
whole command line, and under a sweep every rank would compose other hyper-parameters, without an error.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabletrain.config.compose import Composed, compose, expand
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.resume import checkpoint_of
from stabletrain.config.validate import check
from stabletrain.errors import UserError
from stabletrain.launch import mlflow_run
from stabletrain.launch.final_status import final_result
from stabletrain.launch.process import run_process, worker_command, worker_environment
from stabletrain.launch.result import Result, read_result
from stabletrain.launch.run_folder import make_run_folder, write_run_yaml
from stabletrain.launch.slurm import submit


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """The arguments of ``stabletrain train`` and ``validate``.

    Args:
        recipe: the recipe given by position; None if there was none.
        overrides: Hydra overrides.
        multirun: whether ``-m`` was given.
        trust: packages given by ``--trust``.
    """

    recipe: str | None
    overrides: tuple[str, ...] = ()
    multirun: bool = False
    trust: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The equivalent command line."""
        trust = [word for name in self.trust for word in ("--trust", name)]
        recipe = [self.recipe] if self.recipe else []
        return ["stabletrain", "train", *recipe, *self.overrides, *(["-m"] if self.multirun else []), *trust]


@dataclass(frozen=True, kw_only=True)
class FinishedJob:
    """One job and how it ended.

    Args:
        recipe: as typed.
        overrides: of this job.
        config: the content of run.yaml.
        result: how it ended; None for a job that was submitted to SLURM.
        warning: what failed after the run had ended, in the tracking store; None if nothing did.
        slurm_job: the job's number in SLURM; None for other jobs.
    """

    recipe: str
    overrides: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)
    result: Result | None
    warning: str | None = None
    slurm_job: str | None = None


def prepare(request: LaunchRequest) -> list[tuple[str, Composed]]:
    """Compose and validate the jobs of a request; return pairs of the recipe as typed and its config.

    Args:
        request: the arguments of the command.

    Raises:
        ConfigError: with every mistake in every job.
    """
    # the user's own modules are in the current folder, which is not in a console script's sys.path
    if request.trust and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    jobs: list[tuple[str, Composed]] = []
    problems: list[Problem] = []
    for recipe, overrides in expand(request.recipe, request.overrides, multirun=request.multirun):
        composed = compose(recipe, overrides)
        problems += check(composed, request.trust)
        jobs.append((recipe, composed))
    if problems:
        raise ConfigError(dict.fromkeys(problems))
    return jobs


def run(request: LaunchRequest, jobs: Sequence[tuple[str, Composed]], report: Reporter) -> list[FinishedJob]:
    """Run prepared jobs one after the other, each in a new process; Ctrl-C ends the whole sweep.

    Args:
        request: the arguments of the command.
        jobs: from `prepare`.
        report: called when a job starts.

    Raises:
        UserError: if a job cannot be started; the jobs before it have run.
    """
    parent: str | None = None
    names = _names(jobs)
    finished: list[FinishedJob] = []
    with ExitStack() as stack:
        stack.enter_context(mlflow_run.sigterm_raises())
        for number, (recipe, composed) in enumerate(jobs):
            uri = mlflow_run.open_store(composed.config)
            if uri is not None and parent is None and request.multirun:
                experiment = composed.config["logger"].get("experiment") or composed.recipe
                parent = mlflow_run.open_sweep(uri, experiment, " ".join(request.command))
                stack.enter_context(mlflow_run.sweep_settled(uri, parent))
            job = _Job(
                recipe=recipe, composed=composed, number=number if request.multirun else None, name=names[number]
            )
            done = _run_job(job, uri, parent, request, report)
            finished.append(done)
            if done.result is not None and done.result.end in ("interrupted", "terminated"):
                break
        if parent is not None and uri is not None:
            mlflow_run.finish_sweep(uri, parent, [done.result for done in finished if done.result is not None])
    return finished


class Reporter:
    """Called during `run`; this base class does nothing."""

    def starting(self, config: dict[str, Any], number: int | None) -> None:
        """Called before a worker starts.

        Args:
            config: the content of run.yaml.
            number: of the job in a sweep; None outside a sweep.
        """


@dataclass(frozen=True, kw_only=True)
class _Job:
    recipe: str
    composed: Composed
    number: int | None
    name: str | None


def _names(jobs: Sequence[tuple[str, Composed]]) -> list[str | None]:
    """Name each job of a sweep by the overrides that it does not share with all others."""
    if len(jobs) == 1:
        return [None]
    all_words = [[f"recipe={composed.recipe}", *composed.overrides] for _, composed in jobs]
    return [" ".join(word for word in words if not all(word in other for other in all_words)) for words in all_words]


def _run_job(job: _Job, uri: str | None, parent: str | None, request: LaunchRequest, report: Reporter) -> FinishedJob:
    recipe, composed = job.recipe, job.composed
    config = run_config(composed, request.trust)
    existed = config["run_dir"] is not None and Path(config["run_dir"]).expanduser().exists()
    folder = make_run_folder(composed.recipe, config["run_dir"], job=job.number)
    config["run_dir"] = str(folder)
    try:
        if uri is not None:
            mlflow_run.open_run(config, uri, parent=parent, name=job.name)
        run_yaml = write_run_yaml(config)
        environment = worker_environment(config["launch"], request.trust)
        report.starting(config, job.number)
        if config["launch"]["kind"] == "slurm":
            number = submit(config, run_yaml, environment)
            return FinishedJob(
                recipe=recipe, overrides=composed.overrides, config=config, result=None, slurm_job=number
            )
    except UserError:
        mlflow_run.finish_run(config, Result(end="refused"))
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except BaseException as error:
        mlflow_run.finish_run(config, Result(end=mlflow_run.end_of(error)))
        raise
    try:
        ended = run_process(worker_command(config["launch"], run_yaml), environment)
        result = final_result(config, ended)
    except BaseException as error:
        mlflow_run.finish_run(config, read_result(folder) or Result(end=mlflow_run.end_of(error)))
        raise
    warning = mlflow_run.finish_run(config, result)
    return FinishedJob(recipe=recipe, overrides=composed.overrides, config=config, result=result, warning=warning)


def run_config(composed: Composed, trust: Sequence[str]) -> dict[str, Any]:
    """Return the content of run.yaml for a composed config, without the values that are known only later.

    Args:
        composed: a config without problems.
        trust: packages given by ``--trust``; recorded only, since a worker does not trust what run.yaml names.
    """
    config = {key: value for key, value in composed.config.items() if key != "dry_run"}
    if config["resume"] is not None:
        config["resume"] = str(checkpoint_of(config["resume"]))
    order = ("recipe", "seed", "run_dir", "resume", "model", "data", "optimizer", "schedule", "plugins", "guard")
    rest = ("callbacks", "chaos", "precision", "strategy", "trainer", "logger", "launch")
    return {key: config.get(key) for key in (*order, *rest)} | {"trust": list(trust), "choices": composed.choices}
