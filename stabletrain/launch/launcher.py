"""From a command line to finished runs: compose, start the worker, which checks and builds, open the run, train.

The worker is a new process. While it imports torch and builds the run, the launcher makes the tracking store ready.
Only if the worker has found no mistake does the launcher make the run's folder and open its MLflow run.

Hydra runs in this process only, not in the worker: Lightning starts the processes of a distributed run by repeating the
whole command line, and under a sweep every rank would compose other hyper-parameters, without an error.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stabletrain.config.compose import Composed, compose, expand
from stabletrain.config.origins import with_origin
from stabletrain.config.outputs import typed_keys
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.restarts import allowed_restarts
from stabletrain.config.resume import checkpoint_of
from stabletrain.config.validate import check_keys
from stabletrain.errors import UserError
from stabletrain.launch import mlflow_run
from stabletrain.launch.attempt_end import AttemptEnd
from stabletrain.launch.connection import Report, Workers
from stabletrain.launch.other_nodes import has_other_nodes, other_nodes
from stabletrain.launch.process import local_command, start_process, worker_environment
from stabletrain.launch.recording import git_of_run, record_git
from stabletrain.launch.result import Result, read_result
from stabletrain.launch.run_attempts import Processes, go_on, started
from stabletrain.launch.run_folder import choose_run_folder, make_run_folder, remove_unused, write_run_yaml
from stabletrain.launch.side_by_side import Place, run_each
from stabletrain.launch.slurm import submit
from stabletrain.launch.start_up import (
    BEFORE_TRAINING,
    StartFailed,
    StartInterrupted,
    StartUp,
    end,
    problems_in,
    reported,
)
from stabletrain.launch.sweep_run import SweepRun
from stabletrain.launch.sweep_text import SweepJob, sweep_name
from stabletrain.planning.plan import Plan, from_json
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
        typed: the whole command line, of another command than ``train``; empty: ``train``.
    """

    recipe: str | None
    overrides: tuple[str, ...] = ()
    multirun: bool = False
    trust: tuple[str, ...] = ()

    typed: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """The equivalent command line."""
        if self.typed:
            return list(self.typed)
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
        environment: further variables of its worker.
    """

    recipe: str
    composed: Composed
    number: int | None
    name: str | None
    tags: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


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
        number: in a sweep; None outside a sweep.
    """

    recipe: str
    overrides: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)
    result: Result | None
    warning: str | None = None
    slurm_job: str | None = None
    number: int | None = None


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
        if request.multirun and not problems and has_other_nodes(composed[-1][1].config):
            text = "the nodes of a run are started by hand, for each run anew: start one run at a time, or launch=slurm"
            problems.append(Problem("launch.nodes", text))
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
        raise _refused(problems, jobs)
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
        raise _refused(problems, jobs)


def plan_jobs(jobs: Sequence[Job], request: LaunchRequest) -> list[tuple[Plan | None, str | None]]:
    """Build what the configs describe, as `check_jobs`, and plan their runs, in the same new process.

    Args:
        jobs: from `prepare`.
        request: the arguments of the command.

    Returns:
        For each job the plan, or None and why there is none.

    Raises:
        ConfigError: with every mistake in every job.
        StartFailed: if the user's own code fails, or the process died.
        StartInterrupted: after Ctrl-C or SIGTERM.
    """
    found = _reports_on(jobs, request, then="plan", build=True)
    problems = problems_in(found)
    if problems:
        raise _refused(problems, jobs)
    return [(None if plan is None else from_json(plan), why) for report in found for plan, why in report.plans]


def examine_job(job: Job, request: LaunchRequest, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Build what a config describes, and look for common mistakes in its module and data, in one new process.

    Args:
        job: from `prepare`.
        request: the arguments of the command.
        options: see `stabletrain.launch.examining.examine_config`.

    Returns:
        The report: its ``lines``, and all of it as plain data, ``content``.

    Raises:
        ConfigError: with every mistake in the config.
        StartFailed: if the user's own code fails before it is examined, or the process died.
        StartInterrupted: after Ctrl-C or SIGTERM.
    """
    found = _reports_on([job], request, then="examine", build=True, options=options)
    problems = problems_in(found)
    if problems:
        raise ConfigError(problems)
    return found[0].examined[0]


def run(request: LaunchRequest, jobs: Sequence[Job], report: Reporter, *, at_once: int = 1) -> list[FinishedJob]:
    """Run prepared jobs, each in a new process; Ctrl-C ends the whole sweep. A job that fails does not end it.

    Args:
        request: the arguments of the command.
        jobs: from `prepare`.
        report: called when a job starts.
        at_once: the maximum number of jobs at a time.

    Returns:
        The jobs that ran, in their order.

    Raises:
        UserError: if a single job cannot be started.
        StartFailed: if the user's own code fails before the training of a single job, or its worker died.
        StartInterrupted: if Ctrl-C or SIGTERM arrived before training.
    """
    config = jobs[0].composed.config
    if len(jobs) > 1 or config["launch"]["kind"] == "slurm" or has_other_nodes(config):
        check_jobs(jobs, request)
    if not request.multirun:
        return run_jobs(request, jobs, report, at_once=at_once)
    name = sweep_name([job.composed.recipe for job in jobs], [job.composed.overrides for job in jobs])
    sweep = SweepRun(request.command, name, len(jobs))
    order = {job.number: place for place, job in enumerate(jobs)}
    finished = run_jobs(request, jobs, report, sweep=sweep, at_once=at_once)
    return sorted(finished, key=lambda done: order[done.number])


def run_jobs(
    request: LaunchRequest,
    jobs: Iterable[Job],
    report: Reporter,
    *,
    sweep: SweepRun | None = None,
    at_once: int = 1,
    when_done: Callable[[FinishedJob], None] | None = None,
) -> list[FinishedJob]:
    """Run jobs as they come; see `run`.

    Args:
        request: the arguments of the command.
        jobs: the next one is taken when there is room for it.
        report: called when a job starts.
        sweep: the run in MLflow above the jobs; None: there is none.
        at_once: the maximum number of jobs at a time.
        when_done: called after each job, before a further one is taken in its place.

    Returns:
        The jobs that ran, in the order in which they ended.
    """
    shared = _Shared(request, sweep)
    finished: list[FinishedJob] = []
    with StartUp() as start_up:

        def work(job: Job, place: int) -> FinishedJob:
            done = _run_job_of_several(job, shared, start_up, report, Place(place, at_once))
            shared.add(job, done)
            if when_done is not None:
                when_done(done)
            return done

        try:
            for done in run_each(jobs, work, at_once=at_once, start_up=start_up, ends=_was_interrupted):
                finished.append(done)
        except BaseException as error:
            shared.finish(_result_of(error))
            raise
        shared.finish()
    return finished


def _was_interrupted(done: FinishedJob) -> bool:
    return done.result is not None and done.result.end in ("interrupted", "terminated")


class Reporter:
    """Called during `run`; this base class prints what the user must do, and nothing else."""

    def starting(self, config: dict[str, Any], number: int | None) -> None:
        """Called before a worker starts.

        Args:
            config: the content of run.yaml.
            number: of the job in a sweep; None outside a sweep.
        """

    def note(self, text: str) -> None:
        """Print a line about the nodes of a run, such as how the others are started.

        Args:
            text: one line.
        """
        print(text, flush=True)

    def not_started(self, error: Exception, number: int | None) -> None:
        """Called if a job of a sweep cannot be started.

        Args:
            error: why.
            number: of the job.
        """


class _Shared:
    """What the jobs of a request share: the run above them in MLflow, if there is one, and a lock."""

    def __init__(self, request: LaunchRequest, sweep: SweepRun | None) -> None:
        self.request = request
        self.sweep = sweep
        self.store_lock = threading.RLock()
        """Held by a job while it uses the tracking store: MLflow's client is not made for several threads."""
        self._is_said = False

    def parent(self, config: Mapping[str, Any], uri: str) -> str | None:
        """Return the id of the run above a job, which the first job creates.

        Args:
            config: of the job.
            uri: tracking URI of the store.
        """
        if self.sweep is None:
            return None
        return self.sweep.open(uri, config["logger"].get("experiment") or config["recipe"])

    def add(self, job: Job, done: FinishedJob) -> None:
        """Add a job that has ended to the run above it.

        Args:
            job: the job.
            done: how it ended.
        """
        if self.sweep is not None:
            with self.store_lock:
                self.sweep.add(_sweep_job(job, done))

    def finish(self, last: Result | None = None) -> None:
        """Complete the run above the jobs.

        Args:
            last: of a job that could not be started, and ended the sweep; None: there was none.
        """
        if self.sweep is not None:
            self.sweep.finish(last)

    def say_if_crowded(self, launch: Mapping[str, Any], cores: Sequence[int] | None) -> None:
        """Say once that a worker has more threads than cores of its own.

        Args:
            launch: the ``launch`` node of a job's config.
            cores: of its worker; None: all.
        """
        threads = launch["threads"] * launch["processes"]
        if cores is not None and threads > len(cores) and not self._is_said:
            self._is_said = True
            _logger.warning(
                "each run has %d of the cores, and %d threads, which stay as many since the last bits depend on them "
                "(launch.threads); with fewer --jobs it is faster",
                len(cores),
                threads,
            )


def _names(jobs: Sequence[Composed]) -> list[str | None]:
    """Name each job of a sweep by the overrides that it does not share with all others."""
    if len(jobs) == 1:
        return [None]
    all_words = [[f"recipe={composed.recipe}", *composed.overrides] for composed in jobs]
    return [" ".join(word for word in words if not all(word in other for other in all_words)) for words in all_words]


def _problems_in(jobs: Sequence[Job], request: LaunchRequest, *, build: bool) -> list[Problem]:
    """Return the mistakes that a new process finds when it imports and, with ``build``, builds what configs name."""
    return problems_in(_reports_on(jobs, request, then="end", build=build))


def _refused(problems: Iterable[Problem], jobs: Sequence[Job]) -> ConfigError:
    """The error that shows the mistakes in jobs, each once, with the option that has set a key of another group."""
    origins = {key: option for job in jobs for key, option in job.composed.origins.items()}
    return ConfigError(with_origin(dict.fromkeys(problems), origins))


def _reports_on(
    jobs: Sequence[Job],
    request: LaunchRequest,
    *,
    then: Literal["end", "plan", "examine"],
    build: bool,
    options: Mapping[str, Any] | None = None,
) -> list[Report]:
    environment = worker_environment({"threads": 1}, request.trust)
    configs = [job.composed.config for job in jobs]
    with StartUp() as start_up, Workers(configs, then=then, build=build, options=options) as workers:
        start_up.doing = "ending"
        process = start_process(local_command(*workers.arguments), environment)
        try:
            return reported(workers, process, 1, start_up)
        finally:
            end(workers, process)


def _run_job_of_several(job: Job, shared: _Shared, start_up: StartUp, report: Reporter, place: Place) -> FinishedJob:
    """Run one job; one of a sweep that cannot be started is a failed job, and not the end of the sweep."""
    try:
        return _run_job(job, shared, start_up, report, place)
    except (StartFailed, UserError) as error:
        if isinstance(error, ConfigError):
            error = _refused(error.problems, [job])
        if job.number is None:
            raise error  # the same one, with its traceback, or the mistakes in the config
        report.not_started(error, job.number)
        config = run_config(job.composed, shared.request.trust)
        config["run_dir"] = str(choose_run_folder(job.composed.recipe, config["run_dir"], job=job.number))
        lines = str(error).strip().splitlines() or [type(error).__name__]
        result = Result(end=_result_of(error).end, message=f"not started: {lines[-1]}")
        return _finished(job, config, result)


def _finished(
    job: Job, config: dict[str, Any], result: Result | None, *, warning: str | None = None, slurm_job: str | None = None
) -> FinishedJob:
    return FinishedJob(
        recipe=job.recipe,
        overrides=job.composed.overrides,
        config=config,
        result=result,
        warning=warning,
        slurm_job=slurm_job,
        number=job.number,
    )


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


def _run_job(job: Job, shared: _Shared, start_up: StartUp, report: Reporter, place: Place) -> FinishedJob:
    composed, request = job.composed, shared.request
    config = run_config(composed, request.trust)
    folder = choose_run_folder(composed.recipe, config["run_dir"], job=job.number)
    config["run_dir"] = str(folder)
    environment = {**worker_environment(config["launch"], request.trust), **job.environment}
    if config["launch"]["kind"] == "slurm":
        uri, git = mlflow_run.open_store(config), git_of_run(config)
        with _opened(config, job, shared, uri, git, start_up) as opened:
            report.starting(config, job.number)
            number = submit(config, opened.run_yaml, environment)
        return _finished(job, config, None, slurm_job=number)
    prefix = f"job {job.number}: " if place.is_shared else ""
    start = partial(started, environment=environment, place=place, start_up=start_up, prefix=prefix)
    start_up.doing = BEFORE_TRAINING
    if has_other_nodes(config):
        return _run_on_several_nodes(job, config, shared, start_up, report, start)
    with start(config) as processes:
        shared.say_if_crowded(config["launch"], place.cores)
        with shared.store_lock:
            uri = mlflow_run.open_store(config)  # while the worker imports torch
        git = git_of_run(config)
        processes.check()
        with _opened(config, job, shared, uri, git, start_up) as opened:
            report.starting(config, job.number)
            _say_if_not_restarted(config)
            ended = processes.train(opened.use)
        with _settled_if_cut_short(config):
            first = processes.end(config, ended)
    return _finish_job(job, config, shared, start_up, first, start, prefix)


def _run_on_several_nodes(
    job: Job,
    config: dict[str, Any],
    shared: _Shared,
    start_up: StartUp,
    report: Reporter,
    start: Callable[..., AbstractContextManager[Processes]],
) -> FinishedJob:
    """Run a job whose other nodes read the run's folder, so that the run is opened before any process is started."""
    with other_nodes(config, report.note) as nodes:
        uri, git = mlflow_run.open_store(config), git_of_run(config)
        start = partial(start, nodes=nodes)
        with _opened(config, job, shared, uri, git, start_up) as opened:
            report.starting(config, job.number)
            _say_if_not_restarted(config)
            nodes.invite()
            with start(config) as processes:
                processes.check()
                ended = processes.train(opened.use)
                with _settled_if_cut_short(config):
                    first = processes.end(config, ended)
        return _finish_job(job, config, shared, start_up, first, start)


@contextmanager
def _settled_if_cut_short(config: Mapping[str, Any]) -> Iterator[None]:
    """Set the status of a run if the block, which comes after its training, is cut short by a second signal."""
    try:
        yield
    except BaseException as error:
        mlflow_run.settle_run(config, read_result(Path(config["run_dir"])) or _result_of(error))
        raise


def _finish_job(
    job: Job,
    config: dict[str, Any],
    shared: _Shared,
    start_up: StartUp,
    first: AttemptEnd,
    start: Callable[..., AbstractContextManager[Processes]],
    prefix: str = "",
) -> FinishedJob:
    """Run further attempts, if there are to be any, and settle the run."""

    def reopen(number: int) -> None:
        with shared.store_lock:
            mlflow_run.continue_run(config, number)

    with _settled_if_cut_short(config):
        result = go_on(config, first, lambda each, number: start(each, number=number), start_up, reopen, prefix)
    with shared.store_lock:
        warning = mlflow_run.finish_run(config, result)
    return _finished(job, config, result, warning=warning)


def _say_if_not_restarted(config: Mapping[str, Any]) -> None:
    """Say why a run that would be restarted by default is not, so that nobody relies on it."""
    _, missing = allowed_restarts(config)
    if missing:
        _logger.warning("the run is not restarted if a process dies: %s (launch.restarts)", missing)


@dataclass
class _Opened:
    """A run's folder and MLflow run; ``is_used`` once a worker trains in it."""

    run_yaml: Path
    is_used: bool = False

    def use(self) -> None:
        """The worker is told to train."""
        self.is_used = True


@contextmanager
def _opened(
    config: dict[str, Any],
    job: Job,
    shared: _Shared,
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
            with shared.store_lock:
                parent = shared.parent(config, uri)
                mlflow_run.open_run(
                    config, uri, parent=parent, name=job.name, command=job.command, tags=job.tags, git=git
                )
        record_git(git, folder)
        write_run_yaml(config)
        start_up.check()
        yield opened
    except BaseException as error:
        with shared.store_lock:
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
    config = {key: value for key, value in composed.config.items() if key not in ("dry_run", "memory", "objective")}
    if config["resume"] is not None:
        config["resume"] = str(checkpoint_of(config["resume"]))
    order = ("recipe", "seed", "run_dir", "resume", "model", "data", "optimizer", "schedule", "plugins", "guard")
    rest = ("param_groups", "runtime", "callbacks", "chaos", "precision", "strategy", "trainer", "logger", "launch")
    record = {"trust": list(trust), "typed": sorted(typed_keys(composed.overrides)), "choices": composed.choices}
    return {key: config.get(key) for key in (*order, *rest)} | record
