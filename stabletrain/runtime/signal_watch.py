"""Handlers of Ctrl-C, SIGTERM and SIGHUP that let the process finish a batch and save. Standard library only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import ClassVar, NoReturn

SAME_PRESS = 0.5
"""Seconds within which a second signal counts as the first one.

Ctrl-C in a terminal, a service manager that stops a whole control group, and ``kill`` of a process group reach this
process directly and once more through the process that forwards its own signals.
"""


class Interrupted(Exception):
    """A signal ended the run.

    Args:
        signum: the signal.
        checkpoint: path of the checkpoint that was saved before the run ended; None if none was.
        how: with or without a checkpoint, and what is lost.
        agreed: whether all processes ended together, after a batch.
    """

    def __init__(self, signum: int, checkpoint: str | None = None, *, how: str = "", agreed: bool = False) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name} {how}".rstrip())
        self.signum = signum
        self.checkpoint = checkpoint
        self.agreed = agreed


class Terminated(SystemExit):
    """SIGTERM ended a script after a checkpoint was saved; the process's exit code is the argument."""


class SignalWatch:
    """A signal handler that remembers the first signal and ends the process at the second.

    While ``patient`` is False, the first signal ends the process, too. Subclasses choose the signals and how the
    process ends.
    """

    signals: ClassVar[tuple[signal.Signals, ...]] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    """The signals that are handled. SIGHUP (the terminal was closed) is not if it was ignored before, as by nohup."""

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        self.signum: int | None = None
        self.must_not_wait: Callable[[], bool] = lambda: False
        """Asked when a signal arrives: whether waiting is in vain, because another process of the run has failed."""
        self.lost: Callable[[], str] = lambda: ""
        """Returns what is lost if the process ends now, for the message."""
        self._pid = os.getpid()
        self._last_at = 0.0
        self._is_over = False

    @property
    def received(self) -> bool:
        """Whether a signal has arrived; ``signum`` is the first one."""
        return self.signum is not None

    def install(self) -> None:
        """Become the handler of the signals; call it again if another handler was installed since."""
        self._pid = os.getpid()
        for signum in self.signals:
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._handle)

    def ignore(self) -> None:
        """From now on signals are only remembered: the process is ending, and writes how."""
        self._is_over = True
        self.lost = lambda: ""  # the handlers stay until Python ends, and must not keep the run alive

    def end_now(self, signum: int) -> NoReturn:
        """Raise the exception that ends the process.

        Args:
            signum: the signal that decides how the run ends.

        Raises:
            Interrupted: always.
        """
        raise Interrupted(signum, how=self.lost())

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            self._handle_in_child(signum)
            return
        now = time.monotonic()
        if self.signum is None:
            self.signum = signum
            ends = not self.patient or self.must_not_wait()
        elif now - self._last_at < SAME_PRESS:
            return
        else:
            ends = True
        self._last_at = now
        if ends and not self._is_over:
            self.end_now(self.signum)

    def _handle_in_child(self, signum: int) -> None:
        """In a forked process, such as a data loader's: the parent decides about the run and ends its children."""
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
