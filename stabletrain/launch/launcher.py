"""From a command line to finished runs: compose, start the worker, which checks and builds, open the run, train.

The worker is a new process. While it imports torch and builds the run, the launcher makes the tracking store ready.
Only if the worker has found no mistake does the launcher make the run's folder and open its MLflow run.

Hydra runs in this process only, not in the worker: Lightning starts the processes of a distributed run by repeating the
whole command line, and under a sweep every rank would compose other hyper-parameters, without an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stabletrain.config.compose import Composed, compose, expand
from stabletrain.config.outputs import typed_keys
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.resume import checkpoint_of
from stabletrain.config.validate import check_keys
from stabletrain.errors import UserError
from stabletrain.launch import mlflow_run
from stabletrain.launch.connection import Workers
from stabletrain.launch.final_status import final_result
from stabletrain.launch.process import local_command, start_process, wait_for, worker_command, worker_environment
from stabletrain.launch.rank_ends import SPARE_ENV, remove_ends, spare_folder
from stabletrain.launch.recording import git_of_run, record_git
from stabletrain.launch.result import Result, read_result
from stabletrain.launch.run_folder import choose_run_folder, make_run_folder, remove_unused, write_run_yaml
from stabletrain.launch.slurm import submit
from stabletrain.launch.start_up import (
    AFTER_TRAINING,
    BEFORE_TRAINING,
    StartFailed,
    StartInterrupted,
    StartUp,
    checked,
    end,
)
from stabletrain.launch.sweep_run import SweepRun
from stabletrain.launch.sweep_text import SweepJob
from stabletrain.runtime.records.run_files import RUN_YAML

_logger = logging.getLogger("stabletrain")


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
class Job:
    """One job of a request.

    Args:
        recipe: as typed.
        composed: its config.
        number: in a sweep; None outside a sweep.
        name: what distinguishes it in a sweep; None for one job.
        tags: further ones of its run in MLflow.
        command: the command line that makes this run alone.
    """

    recipe: str
    composed: Composed
    number: int | None
    name: str | None
    tags: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()


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


def prepare(request: LaunchRequest) -> list[Job]:
    """Compose the jobs of a request, and check what the configs themselves show.

    Args:
        request: the arguments of the command.

    Raises:
        ConfigError: with every mistake in every job, also those that only an import of what they name can find; if a
            mistake makes composing impossible, with that one.
    """
    composed: list[tuple[str, Composed]] = []
    problems: list[Problem] = []
    for recipe, overrides in expand(request.recipe, request.overrides, multirun=request.multirun):
        composed.append((recipe, compose(recipe, overrides)))
        problems += check_keys(composed[-1][1])
    names = _names([each for _, each in composed])
    jobs = [
        Job(
            recipe=recipe,
            composed=each,
            number=number if request.multirun else None,
            name=names[number],
            command=LaunchRequest(recipe=recipe, overrides=each.overrides, trust=request.trust).command,
        )
        for number, (recipe, each) in enumerate(composed)
    ]
    if problems:
        reported = {problem.key for problem in problems}
        problems += [p for p in _problems_in(jobs, request, build=False) if p.key not in reported]
        raise ConfigError(dict.fromkeys(problems))
    return jobs


def check_jobs(jobs: Sequence[Job], request: LaunchRequest) -> None:
    """Build what the configs describe, in one new process that trains nothing.

    Args:
        jobs: from `prepare`.
        request: the arguments of the command.

    Raises:
        ConfigError: with every mistake in every job.
        StartFailed: if the user's own code fails, or the process died.
        StartInterrupted: after Ctrl-C or SIGTERM.
    """
    problems = _problems_in(jobs, request, build=True)
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def run(request: LaunchRequest, jobs: Sequence[Job], report: Reporter) -> list[FinishedJob]:
    """Run prepared jobs one after the other, each in a new process; Ctrl-C ends the whole sweep, a failure one job.

    Args:
        request: the arguments of the command.
        jobs: from `prepare`.
        report: called when a job starts.

    Raises:
        UserError: if a single job cannot be started.
        StartFailed: if the user's own code fails before the training of a single job, or its worker died.
        StartInterrupted: if Ctrl-C or SIGTERM arrived before training.
    """
    if len(jobs) > 1 or jobs[0].composed.config["launch"]["kind"] == "slurm":
        check_jobs(jobs, request)
    names, overrides = [job.composed.recipe for job in jobs], [job.composed.overrides for job in jobs]
    sweep = SweepRun(request.command, names, overrides) if request.multirun else None
    finished: list[FinishedJob] = []
    with StartUp() as start_up:
        try:
            for job in jobs:
                done = _run_job_of_several(job, request, sweep, start_up, report)
                finished.append(done)
                if sweep is not None:
                    sweep.add(_sweep_job(job, done))
                if start_up.signum or (done.result is not None and done.result.end in ("interrupted", "terminated")):
                    break
        except BaseException as error:
            if sweep is not None:
                sweep.finish(_result_of(error))
            raise
        if sweep is not None:
            sweep.finish()
    return finished


class Reporter:
    """Called during `run`; this base class does nothing."""

    def starting(self, config: dict[str, Any], number: int | None) -> None:
        """Called before a worker starts.

        Args:
            config: the content of run.yaml.
            number: of the job in a sweep; None outside a sweep.
        """

    def not_started(self, error: Exception, number: int | None) -> None:
        """Called if a job of a sweep cannot be started.

        Args:
            error: why.
            number: of the job.
        """


def _names(jobs: Sequence[Composed]) -> list[str | None]:
    """Name each job of a sweep by the overrides that it does not share with all others."""
    if len(jobs) == 1:
        return [None]
    all_words = [[f"recipe={composed.recipe}", *composed.overrides] for composed in jobs]
    return [" ".join(word for word in words if not all(word in other for other in all_words)) for words in all_words]


def _problems_in(jobs: Sequence[Job], request: LaunchRequest, *, build: bool) -> list[Problem]:
    """Return the mistakes that a new process finds when it imports and, with ``build``, builds what configs name."""
    environment = worker_environment({"threads": 1}, request.trust)
    configs = [job.composed.config for job in jobs]
    with StartUp() as start_up, Workers(configs, then="end", build=build) as workers:
        start_up.doing = "ending"
        process = start_process(local_command(*workers.arguments), environment)
        try:
            return checked(workers, process, 1, start_up)
        finally:
            end(workers, process)


def _run_job_of_several(
    job: Job, request: LaunchRequest, sweep: SweepRun | None, start_up: StartUp, report: Reporter
) -> FinishedJob:
    """Run one job; one of a sweep that cannot be started is a failed job, and not the end of the sweep."""
    try:
        return _run_job(job, request, sweep, start_up, report)
    except (StartFailed, UserError) as error:
        if job.name is None:
            raise
        report.not_started(error, job.number)
        config = run_config(job.composed, request.trust)
        config["run_dir"] = str(choose_run_folder(job.composed.recipe, config["run_dir"], job=job.number))
        lines = str(error).strip().splitlines() or [type(error).__name__]
        result = Result(end=_result_of(error).end, message=f"not started: {lines[-1]}")
        return FinishedJob(recipe=job.recipe, overrides=job.composed.overrides, config=config, result=result)


def _sweep_job(job: Job, done: FinishedJob) -> SweepJob:
    run_id = done.config["logger"].get("run_id") if mlflow_run.is_tracked(done.config) else None
    return SweepJob(
        number=job.number or 0,
        recipe=job.composed.recipe,
        name=job.name or job.composed.recipe,
        run_id=run_id,
        result=done.result,
        objective=job.composed.config["objective"],
    )


def _run_job(
    job: Job, request: LaunchRequest, sweep: SweepRun | None, start_up: StartUp, report: Reporter
) -> FinishedJob:
    recipe, composed = job.recipe, job.composed
    config = run_config(composed, request.trust)
    folder = choose_run_folder(composed.recipe, config["run_dir"], job=job.number)
    config["run_dir"] = str(folder)
    environment = worker_environment(config["launch"], request.trust)
    if config["launch"]["kind"] == "slurm":
        uri, git = mlflow_run.open_store(config), git_of_run(config)
        with _opened(config, job, sweep, uri, git, start_up) as opened:
            report.starting(config, job.number)
            number = submit(config, opened.run_yaml, environment)
        return FinishedJob(recipe=recipe, overrides=composed.overrides, config=config, result=None, slurm_job=number)
    with spare_folder() as spare, Workers([config], then="train") as workers:
        if spare is not None:
            environment[SPARE_ENV] = str(spare)
        start_up.check()
        start_up.doing = BEFORE_TRAINING
        process = start_process(worker_command(config["launch"], *workers.arguments), environment)
        try:
            uri, git = mlflow_run.open_store(config), git_of_run(config)  # while the worker imports torch
            problems = checked(workers, process, config["launch"]["processes"], start_up)
            if problems:
                raise ConfigError(dict.fromkeys(problems))
            with _opened(config, job, sweep, uri, git, start_up) as opened:
                report.starting(config, job.number)
                remove_ends(folder)

                def begin() -> None:
                    start_up.check()
                    start_up.doing = AFTER_TRAINING  # a signal is the worker's while it runs
                    opened.is_used = True
                    workers.train(opened.run_yaml)

                ended = wait_for(process, begin)
        finally:
            end(workers, process)
        try:
            result = final_result(config, ended, spare)
        except BaseException as error:  # a second signal
            mlflow_run.settle_run(config, read_result(folder) or _result_of(error))
            raise
        warning = mlflow_run.finish_run(config, result)
    return FinishedJob(recipe=recipe, overrides=composed.overrides, config=config, result=result, warning=warning)


@dataclass
class _Opened:
    """A run's folder and MLflow run; ``is_used`` once a worker trains in it."""

    run_yaml: Path
    is_used: bool = False


@contextmanager
def _opened(
    config: dict[str, Any],
    job: Job,
    sweep: SweepRun | None,
    uri: str | None,
    git: Mapping[str, Any],
    start_up: StartUp,
) -> Iterator[_Opened]:
    """Make the run's folder and open its MLflow run; undo both if the block fails before the run is used."""
    folder = Path(config["run_dir"])
    existed = folder.exists()
    start_up.check()
    make_run_folder(folder)
    opened = _Opened(folder / RUN_YAML)
    try:
        if uri is not None:
            experiment = config["logger"].get("experiment") or config["recipe"]
            parent = None if sweep is None else sweep.open(uri, experiment)
            mlflow_run.open_run(config, uri, parent=parent, name=job.name, command=job.command, tags=job.tags, git=git)
        record_git(git, folder)
        write_run_yaml(config)
        start_up.check()
        yield opened
    except BaseException as error:
        mlflow_run.finish_run(config, (opened.is_used and read_result(folder)) or _result_of(error))
        if not opened.is_used:
            remove_unused(folder, keep_folder=existed)
        raise


def _result_of(error: BaseException) -> Result:
    if isinstance(error, StartInterrupted):
        return error.result
    return Result(end="refused" if isinstance(error, UserError) else "failed", message=str(error))


def run_config(composed: Composed, trust: Sequence[str]) -> dict[str, Any]:
    """Return the content of run.yaml for a composed config, without the values that are known only later.

    Args:
        composed: a config without problems.
        trust: packages given by ``--trust``; recorded only, since a worker does not trust what run.yaml names.
    """
    config = {key: value for key, value in composed.config.items() if key not in ("dry_run", "objective")}
    if config["resume"] is not None:
        config["resume"] = str(checkpoint_of(config["resume"]))
    order = ("recipe", "seed", "run_dir", "resume", "model", "data", "optimizer", "schedule", "plugins", "guard")
    rest = ("param_groups", "callbacks", "chaos", "precision", "strategy", "trainer", "logger", "launch")
    record = {"trust": list(trust), "typed": sorted(typed_keys(composed.overrides)), "choices": composed.choices}
    return {key: config.get(key) for key in (*order, *rest)} | record
