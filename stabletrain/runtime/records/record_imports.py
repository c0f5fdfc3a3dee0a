"""`RecordImports`: which modules a run has imported, so that a difference in any other is known not to matter."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from stabletrain.runtime.internals.packages import Callback


class RecordImports(Callback):
    """Write the names of all modules that the first process has imported until the end of the fit.

    Args:
        file: relative to the run's folder; its folder is made.
    """

    def __init__(self, file: str) -> None:
        self.file = file

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the names."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the names."""
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / self.file
            with contextlib.suppress(OSError):  # then every module counts as imported
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(sorted(sys.modules)), encoding="utf-8")
