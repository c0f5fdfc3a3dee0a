"""Ctrl-C and SIGTERM inside a worker: remembered while a batch runs, so that a checkpoint can be saved after it."""

from __future__ import annotations

import signal
from types import FrameType

HANDLED = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to end by a signal.

    Args:
        signum: the signal.
        checkpoint: where the state was saved, if it was.
    """

    def __init__(self, signum: int, checkpoint: str | None = None) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name}")
        self.signum = signum
        self.checkpoint = checkpoint


class SignalWatch:
    """Takes Ctrl-C and SIGTERM over from Python and Lightning, whose own ways lose the checkpoint or the exit code.

    While ``patient`` is set, the first signal is only remembered in ``received``; any other raises `Interrupted`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.patient = False

    def install(self) -> None:
        """Become the handler; call it again after somebody else has taken the signals."""
        for signum in HANDLED:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again, self.received = self.received is not None, signum
        if again or not self.patient:
            raise Interrupted(signum)
