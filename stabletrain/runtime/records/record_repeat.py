"""`RecordRepeat`: what the check of a repeated run needs to know of the repeat, besides its own record."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from stabletrain.runtime.internals.packages import Callback

_UNDETERMINED = re.compile(r"^(\w[\w.:]*) does not have a deterministic implementation")


class RecordRepeat(Callback):
    """Write which modules the first process has imported, and which operators torch calls non-deterministic.

    A difference in a module that was not imported does not matter. torch warns of operators without a deterministic
    implementation with ``deterministic="warn"``, as in all recipes.

    Args:
        file: relative to the run's folder; its folder is made. Gets ``modules`` and ``undetermined``, names each.
    """

    def __init__(self, file: str) -> None:
        self.file = file
        self._undetermined: list[str] = []
        self._inner: Callable[..., Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the warnings that are shown from now on."""
        self._undetermined, self._inner = [], warnings.showwarning
        warnings.showwarning = self._note

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the file."""
        self._end(trainer)

    def _note(self, message: Warning | str, *details: Any, **more: Any) -> None:
        found = _UNDETERMINED.match(str(message))
        if found and found[1] not in self._undetermined:
            self._undetermined.append(found[1])
        assert self._inner is not None
        self._inner(message, *details, **more)

    def _end(self, trainer: Trainer) -> None:
        if self._inner is not None and warnings.showwarning == self._note:
            warnings.showwarning = self._inner
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / self.file
            content = {"modules": sorted(sys.modules), "undetermined": self._undetermined}
            with contextlib.suppress(OSError):  # then every module counts as imported
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content), encoding="utf-8")
