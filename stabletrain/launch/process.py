"""Start a worker in a new process, forward signals to it, and wait for it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import psutil

from stabletrain.config.trust import ENV as TRUST_ENV
from stabletrain.core.intervals import seconds
from stabletrain.launch.process_tree import children, kill_tree
from stabletrain.runtime.signal_watch import SAME_PRESS

TORCHRUN = "stabletrain.launch.torchrun"
"""The module that runs torchrun."""

PATHS_OUTSIDE = "--paths-outside"
"""Option of a worker without a launcher: the paths in its run.yaml may lead out of the run's folder."""

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
        killed: whether the launcher's user had it killed, by a third signal.
        abandoned: whether torchrun was killed from outside, and its workers were ended for that reason.
    """

    code: int
    signum: int | None = None
    killed: bool = False
    abandoned: bool = False


@dataclass(frozen=True, kw_only=True)
class NodePlace:
    """The place of a machine in one attempt of a run on several nodes.

    Args:
        number: of the node; 0 is the one on which the run was started.
        nodes: of the run.
        host: name or address of node 0.
        port: at which the nodes find each other, on node 0.
    """

    number: int
    nodes: int
    host: str
    port: int


_SAVES_WITHIN = 10.0
"""Seconds that the workers of a killed torchrun get to save and end."""
PYTHON = (sys.executable, "-P")
"""Python that does not import from the current folder."""
_WORKER = ("-m", "stabletrain.worker")


def worker_command(launch: Mapping[str, Any], *arguments: str, place: NodePlace | None = None) -> list[str]:
    """Return the command that runs the workers on this machine, with torchrun if there are several processes.

    Args:
        launch: the ``launch`` node of a config.
        arguments: of each worker.
        place: of this machine among the nodes of the run; None: there is one node.
    """
    if launch["kind"] == "local" and launch["processes"] == 1:
        return local_command(*arguments)
    processes = str(launch["processes"])
    where = ["--standalone"] if place is None else _static(place, launch)
    torchrun = [*PYTHON, "-m", TORCHRUN, *where, "--nproc-per-node", processes]
    return [*torchrun, *_WORKER, *arguments, AGREED_ENDS_EXIT_0]


def _static(place: NodePlace, launch: Mapping[str, Any]) -> list[str]:
    """torchrun's options for a node: with numbers given, so that a rank is on the same node in every attempt."""
    numbers = ["--nnodes", str(place.nodes), "--node-rank", str(place.number)]
    where = ["--master-addr", place.host, "--master-port", str(place.port)]
    return [*numbers, *where, "--rdzv-conf", f"timeout={math.ceil(seconds(launch['timeout'], name='launch.timeout'))}"]


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


def start_process(
    command: Sequence[str], environment: Mapping[str, str], *, piped: bool = False
) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own: a terminal's Ctrl-C goes to the launcher only, which forwards it.

    Args:
        command: program and arguments.
        environment: its environment.
        piped: whether its output, errors too, goes to a pipe, its ``stdout``.
    """
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if piped else {}
    return subprocess.Popen(list(command), env=dict(environment), start_new_session=True, **output)  # type: ignore[call-overload, no-any-return]


def wait_for(
    process: subprocess.Popen[bytes], begin: Callable[[], None], meanwhile: Callable[[], None] = lambda: None
) -> ProcessEnd:
    """Let a process begin its work, and wait for its end.

    The first Ctrl-C, SIGTERM or SIGHUP is forwarded to the worker, or to each one that torchrun has started; they may
    finish their batch and save. It decides how the run ends: the second, of any kind, repeats it, and they end
    without a checkpoint; the third sends SIGKILL to all processes of the run.

    Args:
        process: from `start_process`.
        begin: called when signals are forwarded.
        meanwhile: called when the process has begun.
    """
    command = process.args
    through_torchrun = isinstance(command, Sequence) and TORCHRUN in command
    forwarder = _Forwarder(process, through_torchrun=through_torchrun)
    with _forward_signals(forwarder):
        begin()
        workers = list(_started_by(process)) if through_torchrun else []
        meanwhile()
        code = process.wait()
        # only the third signal of the user kills torchrun from here
        abandoned = through_torchrun and code < 0 and forwarder.count <= 2
        if abandoned:
            _end_all(workers)
    kill(process)
    return ProcessEnd(code=code, signum=forwarder.first, killed=forwarder.count > 2, abandoned=abandoned)


def _started_by(process: subprocess.Popen[bytes]) -> Iterator[psutil.Process]:
    for pid in children(process.pid):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended at this moment
            yield psutil.Process(pid)


def _end_all(processes: Sequence[psutil.Process]) -> None:
    """Let processes save and end, as for SIGTERM; kill those that take too long."""
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    for each in psutil.wait_procs(processes, timeout=_SAVES_WITHIN)[1]:
        kill_tree(each.pid)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, all that it has started and its process group, whatever is left of them.

    Args:
        process: from `start_process`.
    """
    kill_tree(process.pid)


def kill_children(process: subprocess.Popen[bytes]) -> None:
    """Kill what a process has started, such as the workers of torchrun, which then reports them.

    Args:
        process: from `start_process`.
    """
    for pid in children(process.pid):
        kill_tree(pid)


class _Forwarder:
    """Forwards signals to a running worker.

    Args:
        process: the worker, or torchrun.
        through_torchrun: whether the workers are children of the process.
    """

    def __init__(self, process: subprocess.Popen[bytes], *, through_torchrun: bool) -> None:
        self._process = process
        self._through_torchrun = through_torchrun
        self._last_at = 0.0
        self.first: int | None = None
        self.count = 0
        self.prints = True

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if self.first is not None and now - self._last_at < SAME_PRESS:
            return
        self._last_at = now
        self.count += 1
        self.first = self.first or signum
        name = signal.Signals(self.first).name
        again = "press Ctrl-C again" if self.first == signal.SIGINT else f"send {name} again"
        _say = _print if self.prints else _print_nothing
        if self.count == 1:
            _say(f"\n{name}: stopping after this batch, with a checkpoint; {again} to stop without one")
        elif self.count == 2:
            _say(f"\n{name}: stopping now, without a checkpoint; {again} to kill the run")
        else:
            _say(f"\n{name}: the run is killed")
            kill_tree(self._process.pid)
            return
        for pid in self._workers():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, self.first)

    def _workers(self) -> list[int]:
        """The workers. torchrun itself would give them 30 s to save, and end their data loaders' processes at once."""
        if self._process.poll() is not None:
            return []
        started = children(self._process.pid) if self._through_torchrun else []
        return started or [self._process.pid]


_in_threads: list[_Forwarder] = []
"""Of the workers that threads wait for, to which `forward_to_all` passes the main thread's signals."""


def forward_to_all(signum: int) -> bool:
    """Forward a signal to every worker that a thread waits for, and return whether there is one.

    Args:
        signum: the signal.
    """
    found = list(_in_threads)
    for each in found:
        each.prints = each is found[0]
        each.handle(signum, None)
    return bool(found)


@contextmanager
def _forward_signals(forwarder: _Forwarder) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        _in_threads.append(forwarder)
        try:
            yield
        finally:
            _in_threads.remove(forwarder)
        return
    handled = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup ignores
        handled.append(signal.SIGHUP)
    before = {signum: signal.signal(signum, forwarder.handle) for signum in handled}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _print_nothing(line: str) -> None:
    """Say nothing: another worker's forwarder says it."""


def _print(line: str) -> None:
    """Print a line, if the terminal still exists."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # RuntimeError: within another print
        print(line, file=sys.stderr, flush=True)
