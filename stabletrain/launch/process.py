"""Start a worker in a new process, forward signals to it, and wait for it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from stabletrain.config.trust import ENV as TRUST_ENV

AGREED_ENDS_EXIT_0 = "--agreed-ends-exit-0"
"""Option of the worker under torchrun, which prints a long report about any exit code but 0 and itself exits with 1.

With it, an end on which all processes agree exits with 0, and the launcher takes the exit code from result.json.
"""


@dataclass(frozen=True, kw_only=True)
class ProcessEnd:
    """How a process ended.

    Args:
        code: its exit code; negative: minus the number of the signal that ended it.
        signum: the first signal that was forwarded to it; None if none was.
    """

    code: int
    signum: int | None = None


PYTHON = (sys.executable, "-P")
"""Python that does not import from the current folder."""
_WORKER = ("-m", "stabletrain.worker")


def worker_command(launch: Mapping[str, Any], *arguments: str) -> list[str]:
    """Return the command that runs the workers on this machine, with torchrun if there are several processes.

    Args:
        launch: the ``launch`` node of a config.
        arguments: of each worker.
    """
    if launch["kind"] == "local" and launch["processes"] == 1:
        return local_command(*arguments)
    processes = str(launch["processes"])
    torchrun = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [*torchrun, *_WORKER, *arguments, AGREED_ENDS_EXIT_0]


def local_command(*arguments: str) -> list[str]:
    """Return the command that runs one worker, without torchrun.

    Args:
        arguments: of the worker.
    """
    return [*PYTHON, *_WORKER, *arguments]


def worker_environment(launch: Mapping[str, Any], trust: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment of a worker.

    Args:
        launch: the ``launch`` node of run.yaml.
        trust: packages given by ``--trust``. They are passed in the environment, because a worker does not trust
            packages that run.yaml names.
    """
    named = {name for name in (*os.environ.get(TRUST_ENV, "").split(","), *trust) if name}
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(launch["threads"]),
        # the processes that a worker or torchrun starts do not import from the current folder either
        "PYTHONSAFEPATH": "1",
        # the iteration order of sets of strings depends on it
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),
        # in a shared store, a restarted process group finds the keys of the previous one and hangs (torch 2.13)
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        TRUST_ENV: ",".join(sorted(named)),
    }


def start_process(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own: a terminal's Ctrl-C goes to the launcher only, which forwards it.

    Args:
        command: program and arguments.
        environment: its environment.
    """
    return subprocess.Popen(list(command), env=dict(environment), start_new_session=True)


def wait_for(process: subprocess.Popen[bytes], begin: Callable[[], None]) -> ProcessEnd:
    """Let a process begin its work, and wait for its end.

    The first Ctrl-C or SIGTERM is forwarded to the process, which may finish its batch and save. The second sends
    SIGTERM, the third SIGKILL, to the process and all processes that it has started.

    Args:
        process: from `start_process`.
        begin: called when signals are forwarded.
    """
    with _forward_signals(process) as forwarded:
        begin()
        code = process.wait()
    kill(process)
    return ProcessEnd(code=code, signum=forwarded[0] if forwarded else None)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its process group, whatever is left of them.

    Args:
        process: from `start_process`.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _forward_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    forwarded: list[int] = []

    def forward(signum: int, frame: FrameType | None) -> None:
        forwarded.append(signum)
        with contextlib.suppress(ProcessLookupError):
            if len(forwarded) == 1:
                name = signal.Signals(signum).name
                print(f"\n{name}: stopping after this batch, with a checkpoint", file=sys.stderr)
                process.send_signal(signum)
            else:
                os.killpg(process.pid, signal.SIGTERM if len(forwarded) == 2 else signal.SIGKILL)

    before = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield forwarded
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
