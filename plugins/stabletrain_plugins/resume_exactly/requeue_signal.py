"""SLURM's signal before the end of a job: Lightning's handler saves a checkpoint, here between two batches."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer

from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.ranks import Ranks


class RequeueSignal:
    """Postpones Lightning's handler of SLURM's signal (SIGUSR1 by default) until a batch or a validation starts.

    The handler saves a checkpoint and requeues the job, at whatever line the signal comes: the weights may be half
    updated, and with several processes each saves at another batch.

    Args:
        trainer: in a fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._handler: Any = None
        self._received: tuple[int, FrameType | None] | None = None
        self._signum = signal.SIGUSR1

    def take_over(self) -> None:
        """Install it in place of Lightning's handler, if there is one; call it in ``on_train_start`` on all ranks.

        Lightning restores the handler of before the fit at the fit's end.
        """
        found = trainer_internals.requeue_handler(self._trainer)
        if found is not None and threading.current_thread() is threading.main_thread():
            self._signum, self._handler = found
            signal.signal(self._signum, self._remember)

    def run_if_received(self) -> None:
        """Call Lightning's handler if any rank got the signal. A collective, if the handler was taken over."""
        if self._handler is None or not Ranks(self._trainer).any(self._received is not None):
            return
        received, self._received = self._received or (self._signum, None), None
        self._handler(*received)

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self._received = signum, frame
