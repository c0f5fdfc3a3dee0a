"""What is seen while a run trains: Lightning's rich bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

# Plugins publish their metrics in trainer.callback_metrics; these belong beside the loss.
_SHOWN = ("train_loss", "grad_norm", "clipped", "skipped", "val_loss")


def progress_bar() -> ProgressBar:
    """Return the progress display that suits where the output goes."""
    return RunBar() if sys.stdout.isatty() else ProgressLines()


def shown_metrics(trainer: Trainer) -> dict[str, Any]:
    """Return the plugin metrics that are worth a place in the bar.

    Args:
        trainer: of the run.
    """
    return {name: f"{float(trainer.callback_metrics[name]):.4g}" for name in _SHOWN if name in trainer.callback_metrics}


class RunBar(RichProgressBar):
    """Lightning's rich bar with loss, gradient norm, clipped and skipped counts."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Add the plugins' metrics to what the module puts there itself."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {**shown_metrics(trainer), **metrics}


class ProgressLines(ProgressBar):
    """One line per interval of time, for logs and pipes.

    Args:
        every: seconds between lines, at least 0.
    """

    def __init__(self, every: float = 10.0) -> None:
        super().__init__()
        self._every = every
        self._next = 0.0
        self._enabled = True

    def disable(self) -> None:
        """Print nothing from now on; Lightning calls it on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._next = time.monotonic() + self._every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Print a line if it is time."""
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
