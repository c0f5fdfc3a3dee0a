"""Files written, checksummed and synced to the disk; folders published and deleted in one rename."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import xxhash

_CHUNK = 4 << 20
"""Number of bytes that are hashed and written at a time; they stay in the processor's cache in between."""
_HOST = os.uname().nodename if hasattr(os, "uname") else "host"
_WRITING = ".writing-"
_DELETED = ".deleted-"
_DAY = 86_400.0


class FileRecord(NamedTuple):
    """Size and checksum of a file.

    Args:
        bytes: its size.
        xxh3_128: its checksum, hexadecimal.
    """

    bytes: int
    xxh3_128: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, sync it to the disk, and return its size and checksum.

    Args:
        path: must not exist.
        chunks: the content, in pieces of any size.

    Raises:
        OSError: if it cannot be written; it is then incomplete.
    """
    digest = xxhash.xxh3_128()
    size = 0
    with path.open("xb", buffering=1 << 20) as file:
        for piece in _pieces(chunks):
            digest.update(piece)
            file.write(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk; file systems that cannot sync folders are assumed not to need it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder to write to; its name marks it as incomplete and contains the host and the process id.

    Args:
        parent: the folder in which it will be published; made if missing.
        name: its name after `publish`.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{_WRITING}{name}-{_HOST}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def publish(folder: Path, name: str) -> Path:
    """Give a complete folder its final name in one rename, and sync the folder before it and the parent after it.

    Args:
        folder: made by `new_folder`; all its files are synced.
        name: its final name; must not exist.
    """
    sync_folder(folder)
    final = folder.with_name(name)
    folder.rename(final)
    sync_folder(final.parent)
    return final


def discard(folder: Path) -> None:
    """Delete a folder; it is renamed first, so that no reader sees it half deleted."""
    gone = folder.with_name(f"{_DELETED}{folder.name}-{_HOST}-{os.getpid()}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove half written and half deleted folders of processes that no longer exist.

    Args:
        parent: a folder of checkpoints.
    """
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        if folder.name.startswith((_WRITING, _DELETED)) and not _in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    owner, _, process = folder.name.rpartition("-")
    try:
        touched = folder.stat().st_mtime
        if not (owner.endswith(f"-{_HOST}") and process.isdecimal()):  # another host's: its processes are not visible
            return time.time() - touched < _DAY
        # in a restarted container another process, often this one, has the same number
        return bool(psutil.Process(int(process)).create_time() <= touched)
    except (OSError, psutil.NoSuchProcess):
        return False
    except psutil.AccessDenied:
        return True


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for chunk in chunks:
        if len(chunk) <= _CHUNK:
            yield chunk
        else:
            view = memoryview(chunk)
            for start in range(0, len(view), _CHUNK):
                yield view[start : start + _CHUNK]
