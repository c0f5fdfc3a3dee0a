"""The launcher's loop of attempts: when a run's processes have died, new ones go on from its newest checkpoint.

Each attempt has processes of its own, torchrun included: the store in which the ranks met is gone with it,
and cause, budget and report are the launcher's.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from stabletrain.config.problems import ConfigError
from stabletrain.launch.attempt_end import AttemptEnd, Begun, conclude, end_attempt, failed_start
from stabletrain.launch.attempts import ATTEMPT_ENV, resume_of_attempt
from stabletrain.launch.bounded import one_message
from stabletrain.launch.connection import Workers
from stabletrain.launch.mlflow_run import import_for_end
from stabletrain.launch.other_nodes import OtherNodes
from stabletrain.launch.process import ProcessEnd, kill_children, start_process, wait_for, worker_command
from stabletrain.launch.rank_ends import SPARE_ENV, add_exit_codes, remove_ends, spare_folder
from stabletrain.launch.result import Result
from stabletrain.launch.side_by_side import Place, Relay, keep_on
from stabletrain.launch.start_up import (
    AFTER_TRAINING,
    BETWEEN_ATTEMPTS,
    StartFailed,
    StartInterrupted,
    StartUp,
    checked,
    end,
)
from stabletrain.runtime.records.run_files import RUN_YAML

_logger = logging.getLogger("stabletrain")


class Processes:
    """The processes of one attempt, which import and build the run, and train when they are told to.

    Args:
        workers: the connections to them.
        process: the worker, or torchrun.
        config: of this attempt.
        begun: of this attempt.
        start_up: the handler of signals while no worker trains.
        spare: the second folder of the processes' ends; None if there is none.
        nodes: the other nodes of the run; None: there are none.
    """

    def __init__(
        self,
        workers: Workers,
        process: subprocess.Popen[bytes],
        config: Mapping[str, Any],
        begun: Begun,
        start_up: StartUp,
        spare: Path | None,
        nodes: OtherNodes | None = None,
    ) -> None:
        self._workers, self._process, self._config = workers, process, config
        self._start_up, self._spare, self._nodes = start_up, spare, nodes
        self.begun = begun

    def check(self) -> None:
        """Wait until all have built the run.

        Raises:
            ConfigError: with every mistake in the config.
            StartFailed: if the user's own code fails, or a process died.
            StartInterrupted: after Ctrl-C or SIGTERM.
        """
        problems = checked(self._workers, self._process, self._config["launch"]["processes"], self._start_up)
        if problems:
            raise ConfigError(problems)

    def train(self, used: Callable[[], object]) -> ProcessEnd:
        """Let them train, and wait for their end.

        Args:
            used: called when nothing can be undone any more.
        """
        folder = Path(self._config["run_dir"])
        if self._nodes is None:
            remove_ends(folder)
        self.begun = replace(self.begun, ready_ns=time.time_ns())

        def begin() -> None:
            self._start_up.check()
            self._start_up.doing = AFTER_TRAINING  # a signal is the worker's while it runs
            used()
            self._workers.train(folder / RUN_YAML)

        return wait_for(self._process, begin, partial(import_for_end, self._config))

    def end(self, config: Mapping[str, Any], ended: ProcessEnd) -> AttemptEnd:
        """Determine how the attempt ended, and what follows.

        Args:
            config: the content of run.yaml.
            ended: from `train`.
        """
        if self._nodes is not None:
            add_exit_codes(self._nodes.end(), self._spare)
        return end_attempt(config, ended, self.begun, self._spare)


@contextmanager
def started(
    config: Mapping[str, Any],
    environment: Mapping[str, str],
    place: Place,
    start_up: StartUp,
    *,
    number: int = 1,
    prefix: str = "",
    nodes: OtherNodes | None = None,
) -> Iterator[Processes]:
    """Start the processes of an attempt; those that do not train end with the block.

    Args:
        config: of the attempt.
        environment: of its processes.
        place: of the job.
        start_up: the handler of signals while no worker trains.
        number: of the attempt, from 1.
        prefix: of each line that they print, if other jobs run at the same time.
        nodes: the other nodes of the run, which are waited for; None: there are none.
    """
    at = None if nodes is None else nodes.gather(start_up.check, number=number)
    begun = Begun.now(number, Path(config["run_dir"]))
    with spare_folder() as spare, Workers([config], then="train") as workers:
        variables = {**environment, ATTEMPT_ENV: str(number), **({SPARE_ENV: str(spare)} if spare is not None else {})}
        start_up.check()
        command = worker_command(config["launch"], *workers.arguments, place=at)
        process = start_process(command, variables, piped=place.is_shared)
        if nodes is not None and at is not None:
            remove_ends(Path(config["run_dir"]))  # before the others begin: one may end before this node is ready
            nodes.begin(number, at, config["resume"], partial(kill_children, process))
        keep_on(process, place.cores)
        relay = Relay(process, prefix) if place.is_shared else None
        try:
            yield Processes(workers, process, config, begun, start_up, spare, nodes)
        finally:
            end(workers, process)
            if nodes is not None:
                nodes.end()
            if relay is not None:
                relay.finish()


def go_on(
    config: Mapping[str, Any],
    last: AttemptEnd,
    start: Callable[[Mapping[str, Any], int], AbstractContextManager[Processes]],
    start_up: StartUp,
    reopen: Callable[[int], object],
    prefix: str = "",
) -> Result:
    """Start further attempts until one ends otherwise than by a death, or the restarts are used up.

    Args:
        config: the content of run.yaml.
        last: how the first attempt ended.
        start: `started` with a config and the number of an attempt.
        start_up: the handler of signals while no worker trains.
        reopen: called with the number of each further attempt, before it trains: the run in MLflow goes on.
        prefix: of what is said, if other jobs run at the same time.

    Returns:
        How the run ended; also written to result.json.
    """
    while True:
        if last.report is not None:
            _logger.warning("%s%s", prefix, last.report.shown())
        if not last.restart:
            return last.result
        number = last.attempt.attempt + 1
        _logger.warning("%s%s", prefix, restart_text(last))
        start_up.doing = BETWEEN_ATTEMPTS
        begun = Begun.now(number, Path(config["run_dir"]))
        ended: ProcessEnd | None = None
        try:
            with start({**config, "resume": resume_of_attempt(config)}, number) as processes:
                begun = processes.begun
                processes.check()
                reopen(number)
                ended = processes.train(lambda: None)
                last = processes.end(config, ended)
        except StartInterrupted as error:
            if ended is not None:
                raise
            return _interrupted(config, last, error)
        except (StartFailed, ConfigError) as error:
            _logger.error("%s%s", prefix, error)
            last = _not_started(config, begun, error, last)


def restart_text(last: AttemptEnd) -> str:
    """Return what the user is told before a restart.

    Args:
        last: how the attempt before ended.
    """
    attempt = last.attempt
    return (
        f"attempt {attempt.attempt} has died at step {attempt.step}: {last.result.message}\n"
        f"  starting all processes again, from the newest checkpoint (launch.restarts: {last.used} of {last.restarts} "
        "without progress)"
    )


def _interrupted(config: Mapping[str, Any], last: AttemptEnd, error: StartInterrupted) -> Result:
    """The end of a run whose user ended it between two attempts: nothing is lost that was not lost before."""
    name = signal.Signals(error.signum).name
    message = f"ended by {name} before attempt {last.attempt.attempt + 1}; attempt {last.attempt.attempt} had died: "
    message = one_message(message + last.result.message)
    result = replace(last.result, end=error.result.end, message=message, steps=last.attempt.step)
    with suppress(OSError):
        result.write(Path(config["run_dir"]))
    return result


def _not_started(
    config: Mapping[str, Any], begun: Begun, error: StartFailed | ConfigError, last: AttemptEnd
) -> AttemptEnd:
    """The end of an attempt whose processes died, or found a mistake, while they imported and built the run."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    message = one_message(f"attempt {begun.number} could not begin: {lines[-1]}")
    result = replace(last.result, end="failed", message=message)
    attempt = failed_start(begun, result, Path(config["run_dir"]))
    return conclude(config, attempt, result, isinstance(error, StartFailed))
