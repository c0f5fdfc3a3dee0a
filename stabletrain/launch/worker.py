"""One process of a run: builds and trains what run.yaml describes, without Hydra's composition.

Trust is checked again, with packages from the environment only, because a run.yaml may come from anywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from stabletrain.errors import UserError
from stabletrain.launch.logs import log_to
from stabletrain.launch.process import AGREED_ENDS_EXIT_0
from stabletrain.launch.result import Result
from stabletrain.launch.worker_end import WorkerEnd
from stabletrain.runtime.records.run_files import WORKER_LOG
from stabletrain.runtime.signal_watch import SignalWatch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def main(argv: Sequence[str]) -> int:
    """Run the worker and return its exit code.

    Args:
        argv: the path of a run.yaml; with ``--agreed-ends-exit-0`` the exit code is 0 at an end on which all processes
            agree (by a plugin or a signal), and only result.json records how the run ended.
    """
    watch = SignalWatch()
    watch.install()
    agreed_ends_exit_0 = AGREED_ENDS_EXIT_0 in argv
    paths = [word for word in argv if word != AGREED_ENDS_EXIT_0]
    if len(paths) != 1:
        print(f"usage: python -m stabletrain.worker run.yaml [{AGREED_ENDS_EXIT_0}]", file=sys.stderr)
        return 2
    try:
        config = _read(Path(paths[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = _Run(config, watch)
    try:
        result = run.train()
    except BaseException as error:  # a SystemExit in the user's module, too, is no successful end
        result = run.result_of(error)
    code = run.report(result)
    return 0 if agreed_ends_exit_0 and result.end in ("stopped", "interrupted", "terminated") else code


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: expected the run.yaml of a run, but it cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not {"run_dir", "model", "data", "trainer"} <= config.keys():
        raise UserError(f"{path}: expected the run.yaml of a run, with the keys run_dir, model, data and trainer")
    return config


class _Run:
    """The worker's run."""

    def __init__(self, config: Mapping[str, Any], watch: SignalWatch) -> None:
        self.config = config
        self.watch = watch
        self.folder = Path(config["run_dir"])
        self.trainer: Trainer | None = None
        self.started = False
        self.end = WorkerEnd(self.folder, watch)

    def train(self) -> Result:
        """Build the run's objects and fit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log_to(self.folder / WORKER_LOG)
        from stabletrain.launch.assemble import assemble

        run = assemble(self.config, self.watch)
        self.trainer = run.trainer
        run.interrupt.failed = lambda error: self.end.note(error, started=run.interrupt.started)
        try:
            run.fit()
        finally:
            self.started = run.interrupt.started
        self.watch.ignore()
        return Result(end="finished", message="the run has finished")

    def result_of(self, error: BaseException) -> Result:
        """Return the result of a run that an exception ended; log one message, or the whole traceback for a bug."""
        self.watch.ignore()
        return self.end.show(error, started=self.started)

    def report(self, result: Result) -> int:
        """Write the result, and return the exit code."""
        return self.end.hand_over(result, self.trainer).exit_code
