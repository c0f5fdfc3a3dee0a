"""Handlers of Ctrl-C and SIGTERM that let the process finish a batch and save. Standard library only."""

from __future__ import annotations

import signal
from types import FrameType
from typing import ClassVar, NoReturn


class Interrupted(Exception):
    """A signal ended the run.

    Args:
        signum: the signal.
        checkpoint: path of the checkpoint that was saved before the run ended; None if none was.
    """

    def __init__(self, signum: int, checkpoint: str | None = None) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.signum = signum
        self.checkpoint = checkpoint


class SignalWatch:
    """A signal handler that remembers the first signal and ends the process at the second.

    While ``patient`` is False, the first signal ends the process, too. Subclasses choose the signals and how the
    process ends.
    """

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGINT, signal.SIGTERM)
    """The signals that are handled."""

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        self.signum: int | None = None

    @property
    def received(self) -> bool:
        """Whether a signal has arrived; ``signum`` is the last one."""
        return self.signum is not None

    def install(self) -> None:
        """Become the handler of the signals; call it again if another handler was installed since."""
        for signum in self.signals:
            signal.signal(signum, self._handle)

    def end_now(self, signum: int) -> NoReturn:
        """Raise the exception that ends the process.

        Args:
            signum: the signal that has arrived.

        Raises:
            Interrupted: always.
        """
        raise Interrupted(signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_second, self.signum = self.received, signum
        if is_second or not self.patient:
            self.end_now(signum)
