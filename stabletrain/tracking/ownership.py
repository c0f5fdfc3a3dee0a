"""Whose process a run is, so that a run whose process was killed does not stay RUNNING for ever.

MLflow's status is set by the process that ends the run. A process that is killed sets none; the next one that opens the
store finds its runs by the tag `OWNER` and looks whether their processes exist.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from stabletrain.tracking.store_errors import sqlite_path

OWNER = "stabletrain.owner"
"""The process that created the run, or has resumed it."""

WORKER = "stabletrain.owner.worker"
"""The process that trains, where it is another one."""

RUN_DIR = "stabletrain.run_dir"
"""The run's folder, which may hold the result of a worker that ended after its launcher."""

ELSEWHERE = "elsewhere"
"""In place of a process: the run will be on a machine that is not known yet."""

_MAX_RUNS = 100

_OF_THE_MACHINE = (str(0xEFFFFFFC), "none")
"""Namespaces of process ids outside of containers: Linux's first one, and systems without any."""


class Owner(NamedTuple):
    """A process, in the value of a tag.

    Args:
        host: hash of the host's name and network address; the names themselves are not stored.
        boot: identifies the start of the operating system.
        namespace: of process ids, which differs in every container.
        pid: process id.
        started: when the process started, in a unit of the operating system; distinguishes it from a later one with
            the same id.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str

    def to_tag(self) -> str:
        """The tag's value; it begins with the host, for a search."""
        return ":".join(map(str, self))

    @classmethod
    def of(cls, tag: str) -> Owner | None:
        """The inverse of `to_tag`; None for another text."""
        parts = tag.split(":")
        if len(parts) != len(cls._fields) or not parts[3].isdecimal() or len(parts[3]) > 10:
            return None
        return cls(parts[0], parts[1], parts[2], int(parts[3]), parts[4])


def this_process() -> Owner:
    """Return the identity of this process."""
    pid = os.getpid()
    return Owner(_host(), _boot(), _namespace(), pid, _started(pid) or "unknown")


def is_gone(owner: Owner, *, same_disk: bool) -> bool:
    """Return whether a process has certainly ended; False for one that cannot be seen from here.

    Args:
        owner: its identity.
        same_disk: whether owner and this process share a file. Only then is another boot of the same host evidence,
            and only outside of containers: those on different machines may have equal names and addresses, and a file
            on a network disk in common.
    """
    mine = this_process()
    if owner.host != mine.host or owner.namespace != mine.namespace:
        return False
    if owner.boot != mine.boot:
        return same_disk and mine.namespace in _OF_THE_MACHINE
    if owner.started == "unknown":
        return False
    started = _started(owner.pid)
    return started != owner.started and not (started is None and _is_hidden(owner.pid))


def abandoned_runs(client: Any) -> Iterator[tuple[str, dict[str, str], str]]:
    """Yield id, tags and the reason for each RUNNING run of this host whose processes have all ended.

    Args:
        client: of MLflow.
    """
    experiments = [each.experiment_id for each in client.search_experiments(max_results=1000)]
    query = f"attributes.status = 'RUNNING' AND tags.`{OWNER}` LIKE '{_host()}:%'"
    same_disk = sqlite_path(client.tracking_uri) is not None
    for run in client.search_runs(experiments, query, max_results=_MAX_RUNS):
        tags = dict(run.data.tags)
        owners = [Owner.of(tags[key]) for key in (OWNER, WORKER) if key in tags]
        if all(owner is not None and is_gone(owner, same_disk=same_disk) for owner in owners):
            pids = " and ".join(str(owner.pid) for owner in owners if owner is not None)
            yield run.info.run_id, tags, f"process {pids} ended without setting a status"


def _host() -> str:
    identity = json.dumps([platform.node(), uuid.getnode()])
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return str(round(psutil.boot_time() / 60))


def _namespace() -> str:
    try:
        return str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        return "none"


def _is_hidden(pid: int) -> bool:
    """Whether a process exists, but /proc does not show it (mount option hidepid, processes of other users)."""
    if Path(f"/proc/{pid}").exists():
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _started(pid: int) -> str | None:
    """When a process started; None if there is none, or if it has ended and waits for its parent."""
    try:
        # the time in clock ticks, which does not change when the clock is set
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except (OSError, IndexError):
        pass
    try:
        return None if Path("/proc/self/stat").exists() else str(round(psutil.Process(pid).create_time(), 1))
    except psutil.Error:
        return None
