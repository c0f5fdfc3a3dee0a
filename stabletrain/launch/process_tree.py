"""The processes that a process has started. torchrun gives each of its workers a session of its own, so that a signal
to torchrun's process group does not reach them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the ids of the processes that a process has started and that still run.

    Args:
        pid: of the process.
    """
    return [child for child, parent in _parents().items() if parent == pid]


def descendants(pid: int) -> list[int]:
    """Return the ids of the children of a process, of their children, and so on.

    Args:
        pid: of the process.
    """
    parents = _parents()
    found, level = [], [pid]
    while level := [child for child, parent in parents.items() if parent in level]:
        found += level
    return found


def kill_tree(pid: int) -> None:
    """End a process, all that it has started, and its process group, by SIGKILL.

    Args:
        pid: of a process that leads its own process group.
    """
    doomed = descendants(pid)
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(pid, signal.SIGKILL)
    for each in doomed:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, signal.SIGKILL)


def _parents() -> dict[int, int]:
    """The parent of every process; of this machine's /proc, or of ``ps`` where there is none."""
    if not Path("/proc/self/stat").exists():
        return _parents_of_ps()
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                # pid (name) state parent ...; a name may contain spaces and brackets
                fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
                parents[int(entry)] = int(fields[1])
    return parents


def _parents_of_ps() -> dict[int, int]:
    try:
        done = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    pairs = [line.split() for line in done.stdout.splitlines()]
    return {int(pair[0]): int(pair[1]) for pair in pairs if len(pair) == 2}
