"""Starting a worker as a fresh process, passing signals on to it, and waiting for its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from stabletrain.config.trust import ENV as TRUST_ENV

# torchrun prints a page about every exit code but 0, and gives back 1; result.json says it better.
AGREED = "--agreed-ends-exit-0"


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended.

    Args:
        code: its exit code; negative: the signal that ended it.
        signum: the signal that this process passed on to it, if any.
    """

    code: int
    signum: int | None = None


def worker_command(launch: Mapping[str, Any], run_yaml: Path) -> list[str]:
    """Return the command that runs a worker on this machine, through torchrun for several processes.

    Args:
        launch: the ``launch`` node of run.yaml.
        run_yaml: the run's file.
    """
    module = ["-m", "stabletrain.worker", str(run_yaml)]
    if launch["kind"] == "local" and launch["processes"] == 1:
        return [sys.executable, *module]
    processes = str(launch["processes"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    return [*torchrun, *module, AGREED]


def worker_environment(launch: Mapping[str, Any], trust: Iterable[str] = ()) -> dict[str, str]:
    """Return the environment of a worker.

    Args:
        launch: the ``launch`` node of run.yaml.
        trust: packages named on the command line, passed on since run.yaml is not believed.
    """
    named = {name for name in (*os.environ.get(TRUST_ENV, "").split(","), *trust) if name}
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(launch["threads"]),
        # Sets of texts are ordered by hash, and a run may not depend on that.
        "PYTHONHASHSEED": os.environ.get("PYTHONHASHSEED", "0"),
        # A restarted group meets the keys of the one before in a shared store, and hangs (torch 2.13).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        TRUST_ENV: ",".join(sorted(named)),
    }


def run_process(command: Sequence[str], environment: Mapping[str, str]) -> Ended:
    """Run a command to its end.

    The first Ctrl-C or SIGTERM is passed on once, and the process may finish its batch and save; the second ends it
    with SIGTERM, the third with SIGKILL, together with the processes it has started.

    Args:
        command: program and arguments.
        environment: its environment.
    """
    # Its own session: a terminal sends Ctrl-C to a whole group, and every process would get it a second time from here.
    process = subprocess.Popen(list(command), env=dict(environment), start_new_session=True)
    with _passing_signals(process) as passed:
        code = process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    return Ended(code=code, signum=passed[0] if passed else None)


@contextmanager
def _passing_signals(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    passed: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        passed.append(signum)
        with contextlib.suppress(ProcessLookupError):
            if len(passed) == 1:
                print(
                    f"\n{signal.Signals(signum).name}: waiting for the batch to end and its checkpoint", file=sys.stderr
                )
                process.send_signal(signum)
            else:
                os.killpg(process.pid, signal.SIGTERM if len(passed) == 2 else signal.SIGKILL)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield passed
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
