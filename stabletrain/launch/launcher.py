"""From a command line to finished runs: compose, validate, make the folder, open the run, start the worker, settle.

Hydra stays in front and the worker behind it: Lightning starts the processes of a distributed run by repeating the
whole command line, and under a sweep that once composed other hyper-parameters on every rank, without an error.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabletrain.config.compose import Composed, compose, expand
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.validate import check, checkpoint_of
from stabletrain.errors import UserError
from stabletrain.launch import mlflow_run
from stabletrain.launch.process import run_process, worker_command, worker_environment
from stabletrain.launch.result import Result
from stabletrain.launch.run_folder import make_run_folder, write_run_yaml
from stabletrain.launch.settle import conclude
from stabletrain.launch.slurm import submit


@dataclass(frozen=True, kw_only=True)
class LaunchRequest:
    """What was typed.

    Args:
        recipe: the recipe given by position, if any.
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
        """The command line that means the same."""
        trusts = [word for name in self.trust for word in ("--trust", name)]
        first = [self.recipe] if self.recipe else []
        return ["stabletrain", "train", *first, *self.overrides, *(["-m"] if self.multirun else []), *trusts]


@dataclass(frozen=True, kw_only=True)
class Done:
    """One job and its end.

    Args:
        recipe: as typed.
        overrides: of this job.
        config: as in run.yaml.
        result: how it ended; None for a job that was handed to SLURM.
        complaint: what went wrong after the run had ended.
        job: its number at SLURM.
    """

    recipe: str
    overrides: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)
    result: Result | None
    complaint: str | None = None
    job: str | None = None


def prepare(request: LaunchRequest) -> list[tuple[str, Composed]]:
    """Return the jobs of a request, composed and found right: pairs of the recipe as typed and its config.

    Args:
        request: what was typed.

    Raises:
        ConfigError: with every mistake in every job.
    """
    # A module of the user's own lies in the current folder, which a console script does not search.
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


def run(request: LaunchRequest, jobs: Sequence[tuple[str, Composed]], report: Reporter) -> list[Done]:
    """Run prepared jobs one after the other, each in a fresh process; Ctrl-C ends the whole sweep.

    Args:
        request: what was typed.
        jobs: from `prepare`.
        report: told what happens.

    Raises:
        UserError: if a job cannot be started; those before it stay settled.
    """
    parent: str | None = None
    names = _names(jobs)
    finished: list[Done] = []
    for number, (recipe, composed) in enumerate(jobs):
        uri = mlflow_run.open_store(composed.config)
        if uri is not None and parent is None and request.multirun:
            experiment = composed.config["logger"].get("experiment") or composed.recipe
            parent = mlflow_run.open_sweep(uri, experiment, " ".join(request.command))
        job = _Job(recipe=recipe, composed=composed, number=number if request.multirun else None, name=names[number])
        done = _run_job(job, uri, parent, request, report)
        finished.append(done)
        if done.result is not None and done.result.end in ("interrupted", "terminated"):
            break
    if parent is not None and uri is not None:
        mlflow_run.settle_sweep(uri, parent, [done.result for done in finished if done.result is not None])
    return finished


class Reporter:
    """Is told what happens; this one says nothing."""

    def starting(self, config: dict[str, Any], number: int | None) -> None:
        """Hear that a run's worker starts.

        Args:
            config: as in run.yaml.
            number: of the job in a sweep.
        """


@dataclass(frozen=True, kw_only=True)
class _Job:
    recipe: str
    composed: Composed
    number: int | None
    name: str | None


def _names(jobs: Sequence[tuple[str, Composed]]) -> list[str | None]:
    """Name each job of a sweep by what tells it from the others."""
    if len(jobs) == 1:
        return [None]
    words = [[f"recipe={composed.recipe}", *composed.overrides] for _, composed in jobs]
    return [" ".join(word for word in mine if not all(word in other for other in words)) for mine in words]


def _run_job(job: _Job, uri: str | None, parent: str | None, request: LaunchRequest, report: Reporter) -> Done:
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
            slurm = submit(config, run_yaml, environment)
            return Done(recipe=recipe, overrides=composed.overrides, config=config, result=None, job=slurm)
    except KeyboardInterrupt:
        mlflow_run.settle_run(config, Result(end="interrupted"))
        raise
    except UserError:
        mlflow_run.settle_run(config, Result(end="refused"))
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    ended = run_process(worker_command(config["launch"], run_yaml), environment)
    result = conclude(config, ended)
    complaint = mlflow_run.settle_run(config, result)
    return Done(recipe=recipe, overrides=composed.overrides, config=config, result=result, complaint=complaint)


def run_config(composed: Composed, trust: Sequence[str]) -> dict[str, Any]:
    """Return the content of run.yaml for a composed config, but for what is known only when the run is opened.

    Args:
        composed: a config without problems.
        trust: packages given by ``--trust``; recorded, never believed.
    """
    config = {key: value for key, value in composed.config.items() if key != "dry_run"}
    if config["resume"] is not None:
        config["resume"] = str(checkpoint_of(config["resume"]))
    order = ("recipe", "seed", "run_dir", "resume", "model", "data", "optimizer", "schedule", "plugins", "callbacks")
    rest = ("chaos", "precision", "strategy", "trainer", "logger", "launch")
    return {key: config.get(key) for key in (*order, *rest)} | {"trust": list(trust), "choices": composed.choices}
