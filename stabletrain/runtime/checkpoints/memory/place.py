"""The folder of a run on a node's memory file system: private, locked by the run that uses it, removed at its end.

/dev/shm/stabletrain-1000/        of one user, 0700
  3f2a.../                        of one run: a hash of the folder of its checkpoints on disk
    node-0/                       of one node; several on one machine only in tests
      lock                        held by the first process of the node
      00001-of-00004/             the part of rank 1
        step-00000120/  manifest.json  state.json  tensors-00000-of-00001.safetensors
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from stabletrain.runtime.checkpoints import durable
from stabletrain.runtime.checkpoints.store import Entry, Store

try:
    import fcntl
except ImportError:  # Windows
    IS_SUPPORTED = False
else:
    IS_SUPPORTED = True

PREFIX = "node-"
_LOCK = "lock"
_DEAD_AFTER = 3600.0
"""Seconds without a new copy after which those of an unlocked folder are taken for a dead run's: it is unlocked also
between two attempts of one run."""
_PATIENCE = 10.0
"""Seconds to wait for a lock: the processes of the attempt before this one may not have ended yet."""


class InUse(Exception):
    """Another process holds the lock of a node's folder."""


class Place:
    """The copies of one run on the memory file system of this node.

    Args:
        root: folder on the memory file system.
        checkpoints: folder of the run's checkpoints on disk, absolute; the same for every attempt of the run.
        node: number of this node.
    """

    def __init__(self, root: Path, checkpoints: Path, node: int) -> None:
        self.root = root
        self.user = root / f"stabletrain-{os.getuid()}"
        self.run = self.user / xxhash.xxh3_64(str(checkpoints).encode()).hexdigest()
        self.node = self.run / f"{PREFIX}{node}"
        self._lock: int | None = None

    def make(self) -> None:
        """Make the folders.

        Raises:
            OSError: if one cannot be made, or belongs to somebody else, is a link, or is open to others.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        for folder in (self.user, self.run, self.node):
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
                raise PermissionError(errno.EPERM, f"{folder} is not a folder that only this user can open")

    def lock(self, patience: float = _PATIENCE) -> None:
        """Lock this node's folder until `unlock`, or until this process ends.

        Args:
            patience: seconds to wait for it.

        Raises:
            InUse: if another process keeps it locked.
            OSError: if it cannot be locked.
        """
        end = time.monotonic() + patience
        file = self.node / _LOCK
        while True:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if _locked(handle) and os.path.exists(file) and os.path.samestat(os.fstat(handle), os.lstat(file)):
                break
            os.close(handle)
            if time.monotonic() > end:
                raise InUse(str(self.node))
            time.sleep(0.1)
        os.utime(handle)
        self._lock = handle

    def touch(self) -> None:
        """Note that this run lives."""
        if self._lock is not None:
            os.utime(self._lock)

    def unlock(self) -> None:
        """Give the lock back; also on processes that do not hold it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def shard(self, name: str) -> Store:
        """The copies of one part on this node.

        Args:
            name: of the part.
        """
        return Store(self.node / name)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """The name of the part and the copy, of all complete copies on this machine.

        They may be in the folder of another node's number: a node can have another one after a restart.
        """
        for node in _subfolders(self.run):
            for part in _subfolders(node):
                yield from ((part.name, entry) for entry in Store(part).entries())

    def nbytes(self) -> int:
        """Size of the copies on this machine."""
        files = (Path(folder) / name for folder, _, names in os.walk(self.run) for name in names)
        return sum(_size(each) for each in files)

    def clear(self, but: str | None = None) -> None:
        """Remove the copies in this node's folder.

        Args:
            but: identity of the copy that is not removed; None: all are.
        """
        for part in _subfolders(self.node):
            if but is None:
                shutil.rmtree(part, ignore_errors=True)
            for entry in Store(part).entries():
                if entry.manifest.info.copy != but:
                    shutil.rmtree(entry.path, ignore_errors=True)

    def retain(self, names: set[str]) -> None:
        """Remove copies on this node that nobody keeps up to date any more, and folders of killed writes.

        Args:
            names: of the parts that this node keeps.
        """
        for part in _subfolders(self.node):
            if part.name in names:
                durable.sweep(part)
            else:
                shutil.rmtree(part, ignore_errors=True)
        for node in _subfolders(self.run):
            if node != self.node and not _is_locked(node):
                shutil.rmtree(node, ignore_errors=True)

    def remove(self) -> None:
        """Remove this node's folder, at the end of the run; give the lock back."""
        shutil.rmtree(self.node, ignore_errors=True)
        self.unlock()
        for folder in (self.run, self.user):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()

    def sweep(self) -> list[Path]:
        """Remove the copies of dead runs of this user, and return the folders of those that may be alive."""
        others = [each for each in _subfolders(self.user) if each != self.run]
        left = []
        for run in others:
            if any(_is_locked(node) or not _is_old(node) for node in _subfolders(run)):
                left.append(run)
            else:
                shutil.rmtree(run, ignore_errors=True)
        return left


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(Path(each.path) for each in os.scandir(folder) if each.is_dir(follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _locked(handle: int) -> bool:
    # not flock: a DataLoader's worker processes would inherit it, and keep it for some seconds after a kill
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _is_locked(node: Path) -> bool:
    try:
        handle = os.open(node / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not _locked(handle)
    except OSError:
        return True
    finally:
        os.close(handle)


def _is_old(node: Path) -> bool:
    newest = 0.0
    for path in (node / _LOCK, node):
        with contextlib.suppress(OSError):
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest > _DEAD_AFTER


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except OSError:
        return 0
