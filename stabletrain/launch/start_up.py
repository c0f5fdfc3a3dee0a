"""Before training: the launcher waits for what the workers report, and handles signals.

A signal ends the start at the next safe point, since an exception in the middle of anything would leave a half-made
store, or a run whose id is not known yet.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from types import FrameType, TracebackType
from typing import Any

from stabletrain.config.problems import Problem
from stabletrain.launch.connection import Report, Workers
from stabletrain.launch.process import forward_to_all, kill
from stabletrain.launch.result import Result

BEFORE_TRAINING = "training has not begun; ending when the tracking store is in order; a second signal ends at once"
AFTER_TRAINING = "the run has ended; its files are still sent to the tracking store; a second signal ends at once"
BETWEEN_ATTEMPTS = "no process trains at the moment; the run ends at its last checkpoint; a second signal ends at once"

_PATIENCE = 5.0
"""Seconds that a process gets to end after its connection was closed."""


class StartFailed(Exception):
    """The user's own code failed before training, or a worker died; the message is a traceback, or says how."""


class StartInterrupted(BaseException):
    """Ctrl-C, SIGTERM or SIGHUP ended a run before training, or cut short what follows it.

    No `Exception`: it is raised at any place, and a store's client that catches all of those would go on.

    Args:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"ended by {signal.Signals(signum).name} before training")
        self.signum = signum

    @property
    def result(self) -> Result:
        """How the run has ended."""
        return Result(end="interrupted" if self.signum == signal.SIGINT else "terminated", message=str(self))


class StartUp:
    """Handles Ctrl-C, SIGTERM and SIGHUP of the launcher while no worker trains; use it in a ``with`` statement.

    The first signal is remembered for `check`; the second ends whatever is running at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.doing = BEFORE_TRAINING
        self._before: dict[signal.Signals, Any] = {}
        self._hook = sys.unraisablehook

    def __enter__(self) -> StartUp:
        handled = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup ignores
            handled.append(signal.SIGHUP)
        self._before = {signum: signal.signal(signum, self._handle) for signum in handled}
        self._hook, sys.unraisablehook = sys.unraisablehook, self._not_raised
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        sys.unraisablehook = self._hook

    def _not_raised(self, what: sys.UnraisableHookArgs) -> None:
        """Print no traceback if the second signal arrived in a destructor, which drops it; `check` raises it again."""
        if not isinstance(what.exc_value, StartInterrupted):
            self._hook(what)

    def check(self) -> None:
        """End the start if a signal has arrived.

        Raises:
            StartInterrupted: if it has.
        """
        if self.signum is not None:
            raise StartInterrupted(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_second = self.signum is not None
        self.signum = self.signum or signum
        if forward_to_all(signum):  # of jobs side by side: those that do not train yet end at their next `check`
            return
        # not print: a handler may run while something else is being printed
        with contextlib.suppress(OSError):  # the terminal may be gone
            what = "ending at once" if is_second else self.doing
            os.write(2, f"\n{signal.Signals(signum).name}: {what}\n".encode())
        if is_second:
            raise StartInterrupted(self.signum)


def checked(workers: Workers, process: subprocess.Popen[bytes], count: int, start_up: StartUp) -> list[Problem]:
    """Wait until the workers have checked their config, and return the mistakes.

    Args:
        workers: the connections.
        process: the worker, or torchrun.
        count: number of workers.
        start_up: the handler of signals.

    Raises:
        StartFailed: if the user's own code fails, or the process ends.
        StartInterrupted: after Ctrl-C or SIGTERM.
    """
    return problems_in(reported(workers, process, count, start_up))


def problems_in(reports: Iterable[Report]) -> list[Problem]:
    """The mistakes that workers have found, each once.

    Args:
        reports: of the workers.
    """
    return list(dict.fromkeys(Problem(key, text) for report in reports for key, text in report.problems))


def reported(workers: Workers, process: subprocess.Popen[bytes], count: int, start_up: StartUp) -> list[Report]:
    """Wait until the workers have checked their config, and return what they report; see `checked`.

    Args:
        workers: the connections.
        process: the worker, or torchrun.
        count: number of workers.
        start_up: the handler of signals.

    Raises:
        StartFailed: if the user's own code fails, or the process ends.
        StartInterrupted: after Ctrl-C or SIGTERM.
    """

    def waiting() -> None:
        start_up.check()
        code = process.poll()
        if code is not None:
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise StartFailed(
                f"error: the worker {how} while it imported and built what the config names; see its output above"
            )

    reports = workers.gather(count, waiting)
    start_up.check()
    for report in reports:
        if report.failure:
            raise StartFailed(report.failure)
    return reports


def end(workers: Workers, process: subprocess.Popen[bytes]) -> None:
    """End the connections, and with them a process that does not train; kill it if it does not end.

    Args:
        workers: the connections.
        process: the worker, or torchrun.
    """
    workers.close()
    try:
        process.wait(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        kill(process)
        process.wait()
