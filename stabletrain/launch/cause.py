"""What an exception that ended a process means for the run: its end, a message, and whether another rank caused it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from stabletrain.errors import UserError
from stabletrain.launch.bounded import one_message
from stabletrain.launch.result import End, Result
from stabletrain.runtime.signal_watch import Interrupted, Terminated
from stabletrain.runtime.stop import EndReached, TrainingStopped

_NOT_OWN = re.compile(
    r"(^<)|[/\\](site-packages|dist-packages|lib[/\\]python[\d.]+)[/\\]|"
    + re.escape(str(Path(__file__).parents[1]) + os.sep)
    + r"(?!workloads)|[/\\]stabletrain_plugins[/\\]"
)
"""Files that are not the user's own code: installed packages, Python's own modules, and stabletrain without the
workloads, which are modules like a user's."""

MAX_TRACEBACK = 20_000
"""Longest text of a traceback on the terminal, in characters."""

_LOST_PEER = re.compile(
    r"connection (was )?(closed|reset|refused|aborted) by (the )?(remote )?peer|connection reset|broken pipe"
    r"|connection closed|gloo[/\\]|\bNCCL\b.*(error|abort|timeout|unhandled)|ncclRemoteError|ncclSystemError"
    r"|Socket (closed|Timeout)|failed to recv, got 0 bytes|watchdog.*(timeout|collective)"
    r"|Timed out waiting \d+ms for (recv|send) operation|timeout caused pair closure",
    re.IGNORECASE,
)
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
_DIFFERENT = re.compile(r"preamble\.length|collectives? .*(mismatch|differ)", re.IGNORECASE)
"""gloo's error when two processes have called collectives of different sizes."""
_SAME_GPU = re.compile(r"Duplicate GPU detected ?: ?rank (\d+) and rank (\d+) both on CUDA device (\w+)")
"""NCCL's error when two processes of a group use one GPU, which it names by its bus, in hexadecimal digits."""
_DISTRIBUTED = ("DistBackendError", "DistNetworkError", "DistStoreError", "DistError", "DistQueueEmptyError")

Show = Literal["nothing", "message", "traceback"]
Lost = Literal["", "connection", "timeout", "different", "perhaps"]
"""How the connection to another process was lost: it was closed; nothing came in time; the other process had called
another collective; ``perhaps``: some connection was closed, which may be one of the user's own."""
LOST: tuple[Lost, ...] = ("", "connection", "timeout", "different", "perhaps")


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why a process ended.

    Args:
        result: end, message, and the checkpoint that was saved.
        show: what the user should see: a signal needs no message, a mistake one line, a bug its traceback.
        lost: how a connection to another process was lost: it has ended first, or the network failed; else empty.
        place: where in the code the process was, see `place_in_code`.
        agreed: whether all processes decided this end together, so all were alive.
    """

    result: Result
    show: Show
    lost: Lost = ""
    agreed: bool = False
    place: str = ""

    @property
    def lost_peer(self) -> bool:
        """Whether a connection to another process was lost."""
        return self.lost != ""


def cause_of(error: BaseException, *, started: bool) -> Cause:
    """Return what an exception means.

    Args:
        error: that ended the training.
        started: whether the first training batch has begun: a `UserError` before it refuses the run.
    """
    return replace(_cause_of(error, started=started), place=place_in_code(error))


def _cause_of(error: BaseException, *, started: bool) -> Cause:
    # an exception may hide the signal: an import that a signal has cut short raises an ImportError
    interruption = next((each for each in _chain(error) if isinstance(each, Interrupted)), None)
    if interruption is not None:
        end: End = "interrupted" if interruption.signum == signal.SIGINT else "terminated"
        result = Result(end=end, message=one_message(_text(interruption)), checkpoint=interruption.checkpoint)
        return Cause(result=result, show="nothing", agreed=interruption.agreed)
    if any(isinstance(each, Terminated) for each in _chain(error)):
        return Cause(result=Result(end="terminated", message="ended by SIGTERM"), show="nothing", agreed=True)
    if any(isinstance(each, KeyboardInterrupt) for each in _chain(error)):
        return Cause(result=Result(end="interrupted", message="ended by a KeyboardInterrupt"), show="nothing")
    if isinstance(error, EndReached):
        result = Result(end="finished", message=one_message(_text(error)), checkpoint=error.checkpoint)
        return Cause(result=result, show="nothing", agreed=True)
    if isinstance(error, TrainingStopped):
        return Cause(result=Result(end="stopped", message=one_message(_text(error))), show="message", agreed=True)
    if isinstance(error, UserError):
        refused: End = "failed" if started else "refused"
        return Cause(result=Result(end=refused, message=one_message(_text(error))), show="message")
    if isinstance(error, SystemExit):
        message = f"sys.exit({_code(error)}) was called{_place(error)} before the training was complete"
        return Cause(result=Result(end="failed", message=one_message(message)), show="message")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        name = error.filename2 or error.filename  # of a copy, the second is where it should go
        where = f" for {name}" if name else _place(error).rstrip(",")
        message = f"{error.strerror}{where}; free some space, then resume from the last checkpoint"
        return Cause(result=Result(end="failed", message=one_message(message)), show="message")
    if (
        shared := next((found for each in _chain(error) if (found := _SAME_GPU.search(_text(each)))), None)
    ) is not None:
        one, other = sorted((int(shared[1]), int(shared[2])))
        message = (
            f"rank {one} and rank {other} use the same GPU (PCI bus {shared[3]}): NCCL needs one for each "
            "process. Start as many processes as there are GPUs (config key trainer.devices; torchrun's "
            "--nproc-per-node), or make more GPUs visible (CUDA_VISIBLE_DEVICES). On one GPU, train in one process, "
            "with larger batches or gradient accumulation"
        )
        return Cause(result=Result(end="failed" if started else "refused", message=message), show="message")
    message = f"{type(error).__name__}: {_first_and_last_line(_text(error))}"
    lost: Lost = next((kind for kind in map(lost_peer, _chain(error)) if kind), "")
    return Cause(result=Result(end="failed", message=one_message(message)), show="traceback", lost=lost)


def lost_peer(error: BaseException) -> Lost:
    """Return how an exception says that a connection to another process was lost; empty if it does not.

    Args:
        error: one exception, without those that caused it.
    """
    text = _text(error)[:20_000]
    if type(error).__name__ in _DISTRIBUTED or (isinstance(error, RuntimeError) and _LOST_PEER.search(text)):
        if _DIFFERENT.search(text):
            return "different"
        return "timeout" if _TIMED_OUT.search(text) else "connection"
    return "perhaps" if isinstance(error, BrokenPipeError | ConnectionError) else ""


def place_in_code(error: BaseException) -> str:
    """Return where a process was when an exception ended it: file, line and function of the user's own code.

    If none of it was running, the function of torch or Lightning; for a backward pass, that. Empty without a traceback.

    Args:
        error: the exception.
    """
    with contextlib.suppress(Exception):  # of a traceback that was changed by hand
        frames = traceback.extract_tb(error.__traceback__)
        own = [each for each in frames if not _NOT_OWN.search(each.filename)]
        if own:
            return f"{own[-1].filename}, line {own[-1].lineno} ({own[-1].name})"
        if any(each.name in ("backward", "_engine_run_backward") for each in frames):
            return "backward"
        return frames[-1].name if frames else ""
    return ""


def traceback_text(error: BaseException) -> str:
    """Return the traceback of an exception, cut in its middle if it is very long.

    Args:
        error: the exception.
    """
    try:
        text = "".join(traceback.format_exception(error)).rstrip()
    except Exception:  # an exception's own methods are called, which may fail
        text = f"{type(error).__name__}, whose traceback cannot be shown{_place(error)}"
    return one_message(text, MAX_TRACEBACK)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those during whose handling it was raised; each once."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "(its message cannot be shown)"


def _first_and_last_line(text: str) -> str:
    """A message on one line; that of a data loader's exception is a traceback, with the cause in its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ... ".join(lines if len(lines) < 2 else [lines[0], lines[-1]])


def _code(error: SystemExit) -> str:
    try:
        return repr(error.code) if error.code is not None else ""
    except BaseException:
        return "..."


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f" in {frames[-1].filename}, line {frames[-1].lineno}," if frames else ""
