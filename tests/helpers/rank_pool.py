"""Runs a function on several ranks that train together, in processes forked from one that has imported everything.

A script under torchrun spends most of its time with imports; here a case of two ranks costs about as much as its
training. Prefer it to torchrun for tests that do not test the launch itself.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([
    "lightning.pytorch.strategies",
    "stabletrain_plugins",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.optim",
    "torch.distributed.tensor.parallel",
])  # fmt: skip


class RanksFailed(AssertionError):
    """A rank raised, was killed or did not end. `logs`: what each rank printed; `codes`: exit codes, None if hung."""

    def __init__(self, codes: list[int | None], logs: list[str]) -> None:
        ends = "\n".join(f"--- rank {rank}\n{log[-4000:]}" for rank, log in enumerate(logs))
        super().__init__(f"exit codes {codes} (None: still running at the time limit, killed)\n{ends}")
        self.codes = codes
        self.logs = logs


def on_ranks(function: Callable[..., Any], size: int, folder: Path, *args: Any, limit: float = 120.0) -> list[Any]:
    """Call a function on each of several ranks at once, with the environment that torchrun would give them.

    Args:
        function: of a module that can be imported; called as ``function(folder, *args)``.
        size: number of ranks.
        folder: an existing folder; gets ``rank<r>.log`` with what each rank printed.
        args: anything that can be pickled.
        limit: seconds; ranks that are still running then are killed.

    Returns:
        What the function returned on each rank, by rank; anything that `torch.save` takes.

    Raises:
        RanksFailed: a rank raised, was killed, or hung.
    """
    port = _free_port()
    ranks = [_start(function, rank, size, port, folder, args) for rank in range(size)]
    end = time.monotonic() + limit
    for each in ranks:
        each.join(max(0.0, end - time.monotonic()))
    codes = [each.exitcode for each in ranks]
    for each in ranks:
        each.kill()
        each.join()
    if any(code != 0 for code in codes):
        raise RanksFailed(codes, [(folder / f"rank{r}.log").read_text(errors="replace") for r in range(size)])
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]


def _start(
    function: Callable[..., Any], rank: int, size: int, port: int, folder: Path, args: tuple[Any, ...]
) -> ForkServerProcess:
    process = _CONTEXT.Process(target=_run, args=(function, rank, size, port, folder, args), daemon=False)
    process.start()
    return process


def _free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return int(any_port.getsockname()[1])


def _run(function: Callable[..., Any], rank: int, size: int, port: int, folder: Path, args: tuple[Any, ...]) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "ROLE_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "pool",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    code = 0
    try:
        torch.save(function(folder, *args), folder / f"rank{rank}.pt")
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may still run, and would abort the process at the interpreter's end
    os._exit(code)
