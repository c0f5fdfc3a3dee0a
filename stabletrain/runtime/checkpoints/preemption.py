"""Ending a run from outside: a signal is remembered while a batch runs, and all ranks save and stop after it."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer

from stabletrain.runtime.internals import trainer as trainer_internals

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
        if threading.current_thread() is not threading.main_thread() or not trainer_internals.sigterm_is_lightnings(
            trainer
        ):
            return False
        signal.signal(signal.SIGTERM, self._handle)
        return True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            raise SystemExit(EXIT_CODE)
        self.received = True


class StopBetweenBatches(Callback, ABC):
    """Ends the run after a batch, of training or of validation, once any rank was asked to: on all ranks alike.

    A signal reaches the ranks at different batches, or only one of them, and saving needs all of them at once. With
    accumulation it waits for the step: gradients of an open window are not saved, and the run could not go on exactly.
    """

    @property
    @abstractmethod
    def may_stop(self) -> bool:
        """Whether the run can be ended yet; it decides about a collective, so it must be the same on all ranks."""

    @property
    @abstractmethod
    def asked_to_stop(self) -> bool:
        """Whether this rank was asked."""

    @abstractmethod
    def save_and_stop(self, trainer: Trainer) -> NoReturn:
        """Save, and raise what ends the run; called on all ranks."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if asked to."""
        self._stop_if_asked(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation may be long: do not wait for its end when asked to stop."""
        self._stop_if_asked(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if not self.may_stop or trainer_internals.window_is_open(trainer):
            return
        asked = self.asked_to_stop
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self.save_and_stop(trainer)
