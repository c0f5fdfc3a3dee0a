"""One process of a run: everything it does is in run.yaml, and it composes nothing.

Trust is checked again, with packages from the environment only, since a run.yaml may come from anywhere.
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

import yaml

from stabletrain.errors import UserError
from stabletrain.launch.process import AGREED
from stabletrain.launch.result import Result
from stabletrain.launch.signals import Interrupted, SignalWatch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

LOG = "worker.log"


def main(argv: Sequence[str]) -> int:
    """Run the worker and return its exit code.

    Args:
        argv: the path of a run.yaml; with ``--agreed-ends-exit-0`` an end on which all processes agree (by a plugin or
            a signal) is told by result.json alone.
    """
    watch = SignalWatch()
    watch.install()
    agreed = AGREED in argv
    paths = [word for word in argv if word != AGREED]
    if len(paths) != 1:
        print(f"usage: python -m stabletrain.worker run.yaml [{AGREED}]", file=sys.stderr)
        return 2
    try:
        config = _read(Path(paths[0]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    run = _Run(config, watch)
    started = time.monotonic()
    try:
        end = run.train()
    except Exception as error:
        end = run.explain(error)
    code = run.report(end, time.monotonic() - started)
    return 0 if agreed and end.end in ("stopped", "interrupted", "terminated") else code


def _read(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the run.yaml of a run") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict) or not {"run_dir", "model", "data", "trainer"} <= config.keys():
        raise UserError(f"{path}: expected the run.yaml of a run, with run_dir, model, data and trainer")
    return config


class _Run:
    """The worker's one run, and what is known of it while it goes."""

    def __init__(self, config: Mapping[str, Any], watch: SignalWatch) -> None:
        self.config = config
        self.watch = watch
        self.folder = Path(config["run_dir"])
        self.trainer: Trainer | None = None
        self.started = False

    def train(self) -> Result:
        """Build everything and fit."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log_to(self.folder / LOG)
        from stabletrain.launch.assemble import assemble

        run = assemble(self.config, self.watch)
        self.trainer, self.stopper = run.trainer, run.stopper
        try:
            run.fit()
        finally:
            self.started = run.stopper.started
        return Result(end="finished", message="the run has finished")

    def explain(self, error: Exception) -> Result:
        """Say how the run ended, and print what a person needs: one message, or the whole traceback."""
        if isinstance(error, Interrupted):
            end = "interrupted" if error.signum == signal.SIGINT else "terminated"
            return Result(end=end, message=str(error), checkpoint=error.checkpoint)  # type: ignore[arg-type]
        logger = logging.getLogger("stabletrain")
        if type(error).__name__ == "TrainingStopped" and type(error).__module__ == "stabletrain.runtime.stop":
            logger.error("%s", error)
            return Result(end="stopped", message=str(error))
        if isinstance(error, UserError):
            logger.error("error: %s", error)
            return Result(end="failed" if self.started else "refused", message=str(error))
        logger.error("%s", "".join(traceback.format_exception(error)).rstrip())
        return Result(end="failed", message=f"{type(error).__name__}: {error}")

    def report(self, end: Result, seconds: float) -> int:
        """Write result.json on the first rank, and return the exit code."""
        from dataclasses import replace

        threads = None
        if "torch" in sys.modules:
            import torch

            threads = torch.get_num_threads()
        metrics: dict[str, float] = {}
        steps, first = 0, True
        if self.trainer is not None:
            steps, first = self.trainer.global_step, self.trainer.is_global_zero
            metrics = {name: float(value) for name, value in sorted(self.trainer.callback_metrics.items())}
        if first:
            checkpoint = end.checkpoint or newest_checkpoint(self.folder)
            done = replace(
                end, steps=steps, seconds=round(seconds, 3), metrics=metrics, checkpoint=checkpoint, threads=threads
            )
            done.write(self.folder)
        return end.exit_code


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint of a run's folder.

    Args:
        folder: the run's folder.
    """
    from stabletrain.runtime.checkpoints import newest

    verified = newest(folder)
    if verified is not None:
        return str(verified)
    found = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else None


def log_to(path: Path) -> None:
    """Send log records and warnings to a file too; ours appear on the terminal as they are.

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
    # Lightning calls torch's pytree in a way that torch has deprecated; nobody here can mend it.
    warnings.filterwarnings(
        "ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning
    )


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
