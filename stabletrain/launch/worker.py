"""One process of a run: builds and trains what run.yaml describes, without Hydra's composition.

Trust is checked again, with packages from the environment only, because a run.yaml may come from anywhere.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.config.resume import checkpoint_of_run
from stabletrain.config.yaml_file import read_yaml
from stabletrain.errors import UserError
from stabletrain.launch.process import AGREED_ENDS_EXIT_0
from stabletrain.launch.result import Result
from stabletrain.runtime.records.run_files import WORKER_LOG
from stabletrain.runtime.signal_watch import Interrupted, SignalWatch
from stabletrain.runtime.stop import TrainingStopped

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
    started = time.monotonic()
    try:
        result = run.train()
    except Exception as error:
        result = run.result_of(error)
    code = run.report(result, time.monotonic() - started)
    return 0 if agreed_ends_exit_0 and result.end in ("stopped", "interrupted", "terminated") else code


def _read(path: Path) -> dict[str, Any]:
    config = read_yaml(path, exponents=False)
    if not {"run_dir", "model", "data", "trainer"} <= config.keys():
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

    def train(self) -> Result:
        """Build the run's objects and fit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log_to(self.folder / WORKER_LOG)
        from stabletrain.launch.assemble import assemble

        run = assemble(self.config, self.watch)
        self.trainer = run.trainer
        try:
            run.fit()
        finally:
            self.started = run.interrupt.started
        return Result(end="finished", message="the run has finished")

    def result_of(self, error: Exception) -> Result:
        """Return the result of a run that an exception ended; log one message, or the whole traceback for a bug."""
        if isinstance(error, Interrupted):
            end = "interrupted" if error.signum == signal.SIGINT else "terminated"
            return Result(end=end, message=str(error), checkpoint=error.checkpoint)  # type: ignore[arg-type]
        logger = logging.getLogger("stabletrain")
        if isinstance(error, TrainingStopped):
            logger.error("%s", error)
            return Result(end="stopped", message=str(error))
        if isinstance(error, UserError):
            logger.error("error: %s", error)
            return Result(end="failed" if self.started else "refused", message=str(error))
        logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
        return Result(end="failed", message=f"{type(error).__name__}: {error}")

    def report(self, result: Result, seconds: float) -> int:
        """Write result.json on rank 0, and return the exit code."""
        from dataclasses import replace

        threads = None
        if "torch" in sys.modules:
            import torch

            threads = torch.get_num_threads()
        metrics: dict[str, float] = {}
        steps, is_rank_0 = 0, True
        if self.trainer is not None:
            steps, is_rank_0 = self.trainer.global_step, self.trainer.is_global_zero
            metrics = {name: float(value) for name, value in sorted(self.trainer.callback_metrics.items())}
        if is_rank_0:
            checkpoint = result.checkpoint or newest_checkpoint(self.folder)
            replace(
                result, steps=steps, seconds=round(seconds, 3), metrics=metrics, checkpoint=checkpoint, threads=threads
            ).write(self.folder)
        return result.exit_code


def newest_checkpoint(folder: Path) -> str | None:
    """Return the path of the newest complete checkpoint of a run; None if there is none.

    Args:
        folder: the run's folder.
    """
    from stabletrain.runtime.checkpoints.loading import newest

    found = newest(folder) or checkpoint_of_run(folder)
    return str(found) if found else None


def log_to(path: Path) -> None:
    """Log records and warnings to a file, and those of stabletrain to the terminal as bare messages, too.

    Args:
        path: the log file.
    """
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    for name in ("", "lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).addHandler(file)
        logging.getLogger(name).addFilter(_is_no_advertisement)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    logging.getLogger("stabletrain").addHandler(terminal)
    logging.getLogger("stabletrain").setLevel(logging.INFO)
    # a deprecated call of torch's pytree inside Lightning, which users cannot change
    warnings.filterwarnings(
        "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
    )


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
