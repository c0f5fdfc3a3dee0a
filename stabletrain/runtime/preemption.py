"""SIGTERM in a script: remembered while a batch runs, so that a checkpoint can be saved after it."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from lightning.pytorch import Trainer

from stabletrain.runtime import compat

EXIT_CODE = 128 + signal.SIGTERM
"""What a shell, and a scheduler that may requeue the job, sees of a process that SIGTERM has ended: 143."""


class PreemptionWatch:
    """Remembers a SIGTERM; the second one ends the process at once, with `EXIT_CODE`."""

    def __init__(self) -> None:
        self.received = False

    def take_over(self, trainer: Trainer) -> bool:
        """Become the handler, unless somebody else than Lightning is.

        Lightning's own handler saves nothing, ends a script with exit code 0, and in a group of processes calls a
        collective on the one that got the signal. It gives the signal back by itself when the fit ends.

        Args:
            trainer: in ``on_train_start`` or later, when Lightning has installed its handlers.

        Returns:
            Whether the signal is now watched here.
        """
        self.received = False
        if threading.current_thread() is not threading.main_thread() or not compat.sigterm_is_lightnings(trainer):
            return False
        signal.signal(signal.SIGTERM, self._handle)
        return True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise SystemExit(EXIT_CODE)
        self.received = True
