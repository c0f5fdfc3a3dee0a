"""Preemption: after a signal, all ranks save a checkpoint between two batches and end."""

from __future__ import annotations

import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger

from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.internals import sigterm
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.packages import Callback
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.signal_watch import Interrupted, SignalWatch, Terminated

EXIT_CODE = 128 + signal.SIGTERM
"""143, the exit code that shells and schedulers expect of a process that SIGTERM ended; a scheduler may requeue it."""


class PreemptionWatch(SignalWatch):
    """Remembers a SIGTERM; the second one ends the process at once with `EXIT_CODE`."""

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGTERM,)

    def __init__(self) -> None:
        super().__init__(patient=True)

    def take_over(self, trainer: Trainer) -> bool:
        """Become the handler of SIGTERM if Lightning's own is installed, and no other one.

        Lightning's own handler saves nothing, ends a script with exit code 0, and with several processes calls a
        collective on the one that received the signal. Lightning restores the previous handler when the fit ends.

        Args:
            trainer: in ``on_train_start`` or later, when Lightning has installed its handlers.

        Returns:
            Whether this object is now the handler.
        """
        self.signum = None
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread or not trainer_internals.sigterm_is_lightnings(trainer):
            return False
        self.install()
        return True

    def end_now(self, signum: int) -> NoReturn:
        """Raise ``SystemExit`` with `EXIT_CODE`."""
        raise Terminated(EXIT_CODE)


class StopBetweenBatches(Callback, ABC):
    """Ends the run on all ranks after a training or validation batch, once any rank was asked to stop.

    A signal reaches the ranks at different batches, or only one of them, while saving needs all of them at once. With
    gradient accumulation the run stops after the optimizer step: a checkpoint does not hold the gradients of an open
    window, so a run could not resume exactly from within one.

    The ranks ask each other after each batch, or as often as `check_sigterm_every` says.
    """

    _asked_at: int = 0
    _undo_leaving: Callable[[], None] | None = None

    @property
    @abstractmethod
    def may_stop(self) -> bool:
        """Whether the run can be stopped yet. It decides about a collective, so it must be equal on all ranks."""

    @property
    @abstractmethod
    def asked_to_stop(self) -> bool:
        """Whether this rank was asked to stop."""

    @abstractmethod
    def save_and_stop(self, trainer: Trainer) -> NoReturn:
        """Save a checkpoint and raise the exception that ends the run; called on all ranks."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop if any rank was asked to."""
        if AccumulationWindow(trainer).is_open or not sigterm.is_asked_after_batch(trainer, self._asked_at):
            return
        self._asked_at = trainer_internals.batches_seen(trainer)
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
        """Stop if any rank was asked to, without waiting for the end of a long validation."""
        if sigterm.is_asked_in_validation(trainer, batch_idx, dataloader_idx):
            self._stop_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """After a signal, let loggers call the run killed, not failed."""
        self.give_back()
        if isinstance(exception, Interrupted | Terminated):
            call_killed(trainer.loggers)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning handles SIGTERM again."""
        self.give_back()

    def take_over(self, trainer: Trainer) -> None:
        """On all ranks: the handler of SIGTERM is installed, and Lightning's is not."""
        self.give_back()
        self._asked_at = trainer_internals.batches_seen(trainer)
        self._undo_leaving = sigterm.leave_sigterm_to_us(trainer)

    def give_back(self) -> None:
        """Undo `take_over`."""
        if self._undo_leaving is not None:
            self._undo_leaving()
            self._undo_leaving = None

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if not self.may_stop or AccumulationWindow(trainer).is_open:
            return
        if Ranks(trainer).any(self.asked_to_stop):
            self.save_and_stop(trainer)


def call_killed(loggers: Iterable[Logger]) -> None:
    """Let Lightning's MLFlowLogger give the run that a signal ends the status KILLED.

    Lightning calls ``finalize("failed")`` for every exception, while MLflow shows an interrupted run as KILLED. Other
    loggers of Lightning make no difference; `stabletrain.tracking.MLflowLogger` sees the exception itself.

    Args:
        loggers: of the Trainer; an MLFlowLogger's next ``finalize`` is replaced, on the instance.
    """
    for logger in loggers:
        names = {(each.__module__.partition(".")[0], each.__name__) for each in type(logger).__mro__}
        if names & {("lightning", "MLFlowLogger"), ("pytorch_lightning", "MLFlowLogger")}:
            _replace_finalize(logger)


def _replace_finalize(logger: Logger) -> None:
    inner = logger.finalize

    def finalize(status: str = "success") -> None:
        logger.__dict__.pop("finalize", None)
        inner("KILLED" if status == "failed" else status)  # it passes other words on to MLflow unchanged

    logger.finalize = finalize  # type: ignore[method-assign]
