"""A run that a signal ends at once has a final status: a signal's default action runs no code of Python."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = ("SIGHUP", "SIGQUIT", "SIGXCPU", "SIGUSR1", "SIGUSR2")
"""Of terminals and schedulers. Not SIGTERM: in a fit Lightning handles it, and notices other handlers of it."""
_OF_LIGHTNING_IN_SLURM = ("SIGUSR1", "SIGUSR2")
"""Lightning requeues a SLURM job at one of them, unless it has a handler already."""


class EndSignals:
    """Calls ``close`` before a signal ends the process, which it then does as without this class.

    Signals for which there is a handler, or which are ignored, are left alone.

    Args:
        close: called at most once, in the main thread, and not within `postponed`.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._close: Callable[[], None] | None = close
        self._pid = os.getpid()
        self._busy = 0
        self._postponed: int | None = None
        if threading.current_thread() is not threading.main_thread():
            return  # where Python lets nobody set a handler
        for name in _SIGNALS:
            signum = getattr(signal, name, None)
            if signum is None or (name in _OF_LIGHTNING_IN_SLURM and "SLURM_JOB_ID" in os.environ):
                continue
            if signal.getsignal(signum) == signal.SIG_DFL:
                signal.signal(signum, self._handle)

    def remove(self) -> None:
        """Restore the default actions. A handler that another program restores later only has this effect."""
        self._close = None
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                signum = getattr(signal, name, None)
                if signum is not None and signal.getsignal(signum) == self._handle:
                    signal.signal(signum, signal.SIG_DFL)

    @contextmanager
    def postponed(self) -> Iterator[None]:
        """Within this block, which talks to the store, a signal only is remembered; it has its effect at the end."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy and self._postponed is not None:
                self._handle(self._postponed, None)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() == self._pid:  # not in a forked process, such as a data loader's
            if self._busy:
                self._postponed = signum
                return
            close, self._close = self._close, None
            if close is not None:
                close()
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
