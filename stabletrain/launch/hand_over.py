"""The worker's part of the start: check and build for a launcher, wait for its answer, notice when it is gone."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.config.outputs import check_outputs
from stabletrain.config.problems import ConfigError, Problem
from stabletrain.config.validate import check_content
from stabletrain.launch.attempts import goes_on_itself
from stabletrain.launch.connection import Launcher, Report
from stabletrain.launch.imports import importing
from stabletrain.launch.mlflow_run import import_store_of, is_tracked
from stabletrain.launch.process import PATHS_OUTSIDE
from stabletrain.launch.rank_ends import this_rank
from stabletrain.runtime.records.run_files import WORKER_LOG
from stabletrain.runtime.signal_watch import SignalWatch

if TYPE_CHECKING:
    from stabletrain.launch.assemble import Assembled

LAUNCHER_IS_GONE = "the launcher is gone"

JOINED_ENV = "STABLETRAIN_JOINED"
"""Environment variable of the workers that ``stabletrain join`` has started."""


def ignore_signals() -> None:
    """Leave Ctrl-C to the launcher: an exception while torch is imported ends in errors of other kinds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def connect(folder: Path) -> Launcher | None:
    """Connect to the launcher; None if it is gone already.

    Args:
        folder: of the launcher's `Workers`.
    """
    try:
        return Launcher(folder)
    except OSError:
        return None


def import_for(launcher: Launcher) -> None:
    """Import what this process needs to check, build and train, before anything of the user's is imported.

    What fails here is imported again, and reported, where it is needed.

    Args:
        launcher: the connection.
    """
    with importing("lightning"):
        with suppress(Exception):
            importlib.import_module("stabletrain.launch.checks")
        with suppress(Exception):
            if launcher.is_to_train and this_rank() == 0:
                import_store_of(launcher.configs[0])


def check_for_launcher(launcher: Launcher, watch: SignalWatch) -> Assembled | None:
    """Check the launcher's configs and report; return the run that is to be trained, built.

    Args:
        launcher: the connection.
        watch: the handler of signals of the run.

    Returns:
        None if nothing is to be trained.
    """
    rank = int(os.environ.get("RANK", "0"))
    built: Assembled | None = None
    problems: list[Problem] = []
    plans: list[tuple[dict[str, Any] | None, str | None]] = []
    examined: list[dict[str, Any]] = []
    failure: str | None = None
    try:
        from stabletrain.launch.checks import ConstructorBug, check_and_build, check_config

        try:
            if launcher.is_to_train:
                built, problems = check_and_build(launcher.configs[0], watch)
            else:
                configs = launcher.configs
                if launcher.is_to_plan or launcher.is_to_examine:
                    from stabletrain.launch.dry_run import for_this_machine, plan_of

                    configs = [for_this_machine(config) for config in configs]
                for config in configs:
                    problems += check_config(config, build=launcher.is_to_build)
                for config in launcher.configs if launcher.is_to_plan and not problems else ():
                    plan, why, found = plan_of(config)
                    plans.append((plan, why))
                    problems += found
                for config in launcher.configs if launcher.is_to_examine and not problems else ():
                    from stabletrain.launch.examining import examine_config

                    report, found = examine_config(config, **launcher.options)
                    examined += [] if report is None else [report]
                    problems += found
        except ConstructorBug as bug:
            failure = str(bug)
    except Exception as error:
        failure = "".join(traceback.format_exception(error)).rstrip()
    if built is not None:
        launcher.when_gone = partial(_end_or_go_on, launcher.configs[0])
        watch.patient = True  # until training begins, a signal is remembered
        watch.install()
    found_ones = [(each.key, each.text) for each in problems]
    launcher.report(Report(rank=rank, problems=found_ones, failure=failure, plans=plans, examined=examined))
    return built


def wait_for_launcher(launcher: Launcher, watch: SignalWatch) -> Path:
    """Wait for the launcher's word, and return the path of run.yaml.

    If the launcher ends later, the run ends as for SIGTERM, with a checkpoint; with ``launch.detach=true`` it goes on.

    Args:
        launcher: the connection.
        watch: the handler of signals of the run.
    """
    run_yaml = launcher.wait()
    watch.patient = False
    return run_yaml


def _end_or_go_on(config: Mapping[str, Any]) -> None:
    """Called by another thread when the launcher is gone."""
    _print_to(Path(config["run_dir"]) / WORKER_LOG)  # the terminal may be gone, too
    logger = logging.getLogger("stabletrain")
    if os.environ.get(JOINED_ENV):  # this node has left the run: an agreed end would end it on all nodes
        logger.warning("the command that started this process is gone: this node leaves the run")
        os._exit(1)
    if config["launch"].get("detach"):
        logger.warning("%s: going on (launch.detach=true)", LAUNCHER_IS_GONE)
        return
    logger.warning("%s: stopping after this batch, with a checkpoint", LAUNCHER_IS_GONE)
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, signal.SIGTERM)


def _print_to(log: Path) -> None:
    """Let this process print to a file from now on."""
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError:
        file = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    os.close(file)


def without_paths_outside(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run.yaml of which every relative path is in the run's folder.

    Args:
        config: its content. That a key was set on the command line may be a lie.

    Raises:
        ConfigError: if there are paths in it that lead out of the run's folder.
    """
    config = {**config, "typed": []}
    advice = f"which needs the worker's option {PATHS_OUTSIDE}; add it if you trust the file"
    problems = list(check_outputs({**config, "run_dir": None, "launch": None}, (), advice))
    if problems:
        raise ConfigError(problems)
    return config


def check_and_assemble(config: Mapping[str, Any], watch: SignalWatch) -> Assembled:
    """Check and build a run without a launcher.

    Args:
        config: the content of a run.yaml.
        watch: the handler of signals of the run.

    Raises:
        ConfigError: with every mistake in the config.
    """
    missing = [key for key in ("seed", "launch", "trainer", "model", "data") if config.get(key) is None]
    problems = [Problem(key, "run.yaml does not have this key") for key in missing] or check_content(config)
    if problems:
        raise ConfigError(problems)
    from stabletrain.launch.checks import check_and_build

    built, problems = check_and_build(config, watch)
    if built is None:
        raise ConfigError(problems)
    return built


def complete(run: Assembled, config: Mapping[str, Any]) -> None:
    """Replace the MLflow logger of a built run by that of the final config, which names the run in MLflow.

    In a sweep, the trial's callback is added.

    Args:
        run: built before the run was opened.
        config: the content of run.yaml.
    """
    from stabletrain.launch.assemble import build_logger
    from stabletrain.launch.pruning import trial_callback
    from stabletrain.runtime import rng

    if is_tracked(config):
        with rng.preserved():
            logger = build_logger(config)
            # the steps that are made again have the values that were logged already
            logger.repeats = goes_on_itself(config) and bool((config.get("plugins") or {}).get("resume"))
            run.trainer.loggers = [logger]
    trial = trial_callback()
    if trial is not None:
        run.trainer.callbacks.append(trial)  # type: ignore[attr-defined]
