"""Progress of a run: Lightning's rich bar on a terminal, otherwise a line of text from time to time."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

_SHOWN = {
    "train/loss": "train/loss",
    "stability/grad_norm": "grad_norm",
    "stability/clipped_share": "clipped",
    "stability/skipped": "skipped",
    "val/loss": "val/loss",
}
"""Metrics to show, of those in ``trainer.callback_metrics``, and the words to show for them."""


def progress_bar() -> ProgressBar:
    """Return a rich bar if the standard output is a terminal, otherwise lines."""
    return RunBar() if sys.stdout.isatty() else ProgressLines()


def shown_metrics(trainer: Trainer) -> dict[str, Any]:
    """Return the metrics to show beside the step, as text.

    Args:
        trainer: of the run.
    """
    metrics = trainer.callback_metrics
    return {word: f"{float(metrics[name]):.4g}" for name, word in _SHOWN.items() if name in metrics}


class RunBar(RichProgressBar):
    """Lightning's rich bar with loss, gradient norm, clipped and skipped counts."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics of the plugins and those that the module logs with ``prog_bar=True``."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**shown_metrics(trainer), **metrics}


class ProgressLines(ProgressBar):
    """Prints a line from time to time, for logs and pipes.

    Args:
        every: seconds between lines, >= 0.
    """

    def __init__(self, every: float = 10.0) -> None:
        super().__init__()
        self._every = every
        self._next = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Stop printing; Lightning calls it on all ranks but 0."""
        self._enabled = False

    def enable(self) -> None:
        """Resume printing."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._next = time.monotonic() + self._every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if ``every`` seconds have passed since the last one."""
        if self._enabled and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._line(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the last line."""
        if self._enabled:
            self._line(trainer)

    def _line(self, trainer: Trainer) -> None:
        steps = f"{trainer.global_step}/{trainer.max_steps}" if trainer.max_steps > 0 else str(trainer.global_step)
        values = "  ".join(f"{name} {value}" for name, value in shown_metrics(trainer).items())
        print(f"epoch {trainer.current_epoch}  step {steps}  {values}", flush=True)
