"""One process of a run: builds and trains what run.yaml describes, without Hydra's composition.

Trust is checked again, with packages from the environment only, because a run.yaml may come from anywhere.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.config.trust import ENV as TRUST_ENV
from stabletrain.errors import UserError
from stabletrain.launch.attempt_start import AttemptStart
from stabletrain.launch.attempts import resume_of_attempt, this_attempt
from stabletrain.launch.background import sending
from stabletrain.launch.connection import OPTION, Launcher
from stabletrain.launch.hand_over import (
    LAUNCHER_IS_GONE,
    check_and_assemble,
    check_for_launcher,
    complete,
    connect,
    ignore_signals,
    import_for,
    wait_for_launcher,
    without_paths_outside,
)
from stabletrain.launch.imports import collect_before_exit
from stabletrain.launch.logs import WorkerLog
from stabletrain.launch.mlflow_run import finish_run
from stabletrain.launch.process import AGREED_ENDS_EXIT_0, PATHS_OUTSIDE
from stabletrain.launch.rank_ends import is_one_of_several, this_rank
from stabletrain.launch.recording import Recording
from stabletrain.launch.result import Result
from stabletrain.launch.run_folder import read_run_yaml
from stabletrain.launch.worker_end import WorkerEnd
from stabletrain.runtime.records.run_files import WORKER_LOG, rank_log
from stabletrain.runtime.signal_watch import Interrupted, SignalWatch
from stabletrain.safe_path import append_current_folder
from stabletrain.settings import speak_of_keys

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from stabletrain.launch.assemble import Assembled


@speak_of_keys()
def main(argv: Sequence[str]) -> int:
    """Run the worker and return its exit code.

    Args:
        argv: the path of a run.yaml, or ``--launcher`` and the folder of a launcher that names it later; with
            ``--agreed-ends-exit-0`` the exit code is 0 at an end on which all processes agree (by a plugin or a
            signal), and only result.json records how the run ended; with ``--paths-outside`` a run.yaml that no
            launcher has named may let the run write outside of its folder.
    """
    words = [word for word in argv if word not in (AGREED_ENDS_EXIT_0, PATHS_OUTSIDE)]
    if os.environ.get(TRUST_ENV):
        append_current_folder()  # where the user's own modules are
    launcher, log = None, WorkerLog()
    if len(words) == 2 and words[0] == OPTION:
        ignore_signals()
        launcher = connect(Path(words[1]))
        if launcher is None:
            return 0
        log.start()
        # here, where this frame and its callers hold no object of the user's: packages keep exceptions of their
        # imports, with all frames, and these would be alive, and so not collected, until the end of the process
        import_for(launcher)
    try:
        return _work(argv, words, launcher, log)
    finally:
        if launcher is not None:
            collect_before_exit()


def _work(argv: Sequence[str], words: Sequence[str], launcher: Launcher | None, log: WorkerLog) -> int:
    """As `main`, when all is imported; ``words`` are those arguments that are no options."""
    agreed_ends_exit_0 = AGREED_ENDS_EXIT_0 in argv
    watch = SignalWatch()
    built: Assembled | None = None
    if launcher is not None:
        built = check_for_launcher(launcher, watch)
        if built is None:
            return 0
        words = [str(wait_for_launcher(launcher, watch))]
    watch.install()
    if len(words) != 1:
        print(f"usage: python -m stabletrain.worker run.yaml [{AGREED_ENDS_EXIT_0}] [{PATHS_OUTSIDE}]", file=sys.stderr)
        return 2
    try:
        config = read_run_yaml(Path(words[0]))
        if launcher is None and PATHS_OUTSIDE not in argv:
            config = without_paths_outside(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    resume = launcher.configs[0].get("resume") if launcher is not None else _resume(config)
    run = _Run(config, resume, watch, log, built)
    try:
        result = run.train()
    except BaseException as error:  # a SystemExit in the user's module, too, is no successful end
        result = run.result_of(error)
    if launcher is not None and launcher.is_gone and result.end == "terminated":
        result = replace(result, message=f"{result.message}; {LAUNCHER_IS_GONE}")
    code = run.report(result)
    if launcher is not None and launcher.is_gone and run.is_rank_0:
        finish_run(config, result)  # what the launcher would do
    return 0 if agreed_ends_exit_0 and result.end in ("stopped", "interrupted", "terminated") else code


def _resume(config: Mapping[str, Any]) -> str | None:
    """Where a worker without a launcher begins; run.yaml says where the first attempt did."""
    return resume_of_attempt(config) if this_attempt() > 1 else config.get("resume")


class _Run:
    """The worker's run; ``resume`` is that of this attempt, and run.yaml has that of the first."""

    def __init__(
        self,
        config: Mapping[str, Any],
        resume: str | None,
        watch: SignalWatch,
        log: WorkerLog,
        built: Assembled | None = None,
    ) -> None:
        self.config = config
        self.attempt_config = {**config, "resume": resume}
        self.watch = watch
        self.log = log
        self.built = built
        self.folder = Path(config["run_dir"])
        self.trainer: Trainer | None = None
        self.started = False
        self.end = WorkerEnd(self.folder, watch)

    def train(self) -> Result:
        """Build the run's objects, unless they are built already, and fit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log.to(*self._log_files())
        if self.watch.signum is not None:  # it arrived while this process waited for the launcher
            raise Interrupted(self.watch.signum)
        run = self.built or check_and_assemble(self.attempt_config, self.watch)
        self.trainer = run.trainer
        complete(run, self.attempt_config)
        recording, start = Recording(self.config, run.trainer), AttemptStart(self.attempt_config)
        recording.write()
        start.prepare(run)

        def begins(trainer: Trainer, batch: Any) -> None:
            recording.begin(trainer, batch)
            start.begin(trainer)

        run.interrupt.begins, run.interrupt.first_batch_done = begins, start.first_batch_done
        run.interrupt.failed = lambda error, at: self.end.note(error, started=run.interrupt.started, at=at)
        try:
            with sending(self.config, run.trainer):
                run.fit()
        finally:
            self.started = run.interrupt.started
        self.watch.ignore()
        return Result(end="finished", message="the run has finished")

    def _log_files(self) -> list[Path]:
        """Of several processes, rank 0 writes the run's log, and each one a log of its own for every attempt."""
        if not is_one_of_several():
            return [self.folder / WORKER_LOG]
        rank = this_rank()
        own = self.folder / rank_log(this_attempt(), rank)
        return [self.folder / WORKER_LOG, own] if rank == 0 else [own]

    @property
    def is_rank_0(self) -> bool:
        """Whether this is the process that writes the run's result."""
        return self.trainer is None or self.trainer.is_global_zero

    def result_of(self, error: BaseException) -> Result:
        """Return the result of a run that an exception ended; log one message, or the whole traceback for a bug."""
        self.watch.ignore()
        return self.end.show(error, started=self.started)

    def report(self, result: Result) -> int:
        """Write the result, and return the exit code."""
        return self.end.hand_over(result, self.trainer).exit_code
