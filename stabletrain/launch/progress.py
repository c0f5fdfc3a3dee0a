"""Progress of a run: Lightning's rich bar on a terminal, otherwise a line of text from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from rich import get_console

_WIDE = 120
"""Columns of a terminal from which on there is room for the times."""
_COLUMNS = 56
"""Columns that are not for metrics: names of loaders, a bar of 5, counts, the speed, and the spaces between them."""
_TIMES = 18

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
    """Lightning's rich bar with loss, gradient norm, clipped and skipped counts, on one line of the terminal.

    Messages that are printed meanwhile are not wrapped, so that a path in them can be copied.

    Args:
        console_kwargs: further arguments of the rich console.
    """

    def __init__(self, **console_kwargs: Any) -> None:
        super().__init__(console_kwargs={"soft_wrap": True, **console_kwargs})

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Return the columns beside the metrics: without the times on a narrow terminal, and with a short bar."""
        description, bar, batches, times, speed = super().configure_columns(trainer)
        width = get_console().width
        bar.bar_width = min(40, max(5, width - _WIDE))
        return [description, bar, batches, *([times] if width >= _WIDE else []), speed]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics of the plugins and those that the module logs with ``prog_bar=True``, as many as fit."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        width = get_console().width
        columns = _COLUMNS if width < _WIDE else _COLUMNS + _TIMES + min(40, max(5, width - _WIDE)) - 5
        return that_fit({**shown_metrics(trainer), **metrics}, width - columns)


def that_fit(metrics: Mapping[str, Any], room: int) -> dict[str, Any]:
    """Return the metrics that fit on a line, in their order; of the first one at least the end of its name.

    Args:
        metrics: to show as ``name: value``, with a space between them; numbers with three decimals.
        room: columns of the terminal.

    >>> that_fit({"train_loss": "2.31", "a_metric_with_a_very_long_name": "1", "lr": "0.1"}, 25)
    {'train_loss': '2.31', 'lr': '0.1'}
    """
    fit: dict[str, Any] = {}
    for name, value in metrics.items():
        text = value if isinstance(value, str) else f"{value:.3f}" if isinstance(value, int | float) else str(value)
        needed = len(f"{name}: {text} ")
        if needed <= room + 1:
            fit[name] = text
            room -= needed
    if not fit and metrics and room > 0:
        name, value = next(iter(metrics.items()))
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        letters = room - len(f": {text}") - 1
        if letters > 0:
            fit[f"…{name[-letters:]}"] = text
    return fit


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
