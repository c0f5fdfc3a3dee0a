"""Files that survive a power cut: written, checksummed, synced; and folders that appear and vanish in one rename."""

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
"""Bytes hashed and then written at a time: few enough to be still in the processor's cache for the second."""
_HOST = os.uname().nodename if hasattr(os, "uname") else "host"
_WRITING = ".writing-"
_DELETED = ".deleted-"
_DAY = 86_400.0


class FileRecord(NamedTuple):
    """What a manifest says of a file.

    Args:
        bytes: its size.
        xxh3_128: its checksum, hexadecimal.
    """

    bytes: int
    xxh3_128: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file to the disk itself, and return its size and checksum.

    Args:
        path: must not exist.
        chunks: the content, in pieces of any size.

    Raises:
        OSError: whatever the disk says; the file is then incomplete.
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
    """Make the names in a folder durable; file systems that cannot sync folders are believed to need no sync."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def new_folder(parent: Path, name: str) -> Path:
    """Make a folder to write in, whose name says that it is not complete, and who writes it.

    Args:
        parent: where it will be published; made if missing.
        name: what it will be called.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / f"{_WRITING}{name}-{_HOST}-{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def publish(folder: Path, name: str) -> Path:
    """Give a complete folder its name in one rename, after everything in it, and before returning, is durable.

    Args:
        folder: made by `new_folder`; all its files are synced.
        name: must be free.
    """
    sync_folder(folder)
    final = folder.with_name(name)
    folder.rename(final)
    sync_folder(final.parent)
    return final


def discard(folder: Path) -> None:
    """Delete a folder: it loses its name first, so that it is never seen half deleted."""
    gone = folder.with_name(f"{_DELETED}{folder.name}-{_HOST}-{os.getpid()}")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove what killed processes have left half written or half deleted; what a living one works on stays.

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
        if not (owner.endswith(f"-{_HOST}") and process.isdecimal()):  # another host's: its process cannot be asked
            return time.time() - touched < _DAY
        # in a container that was restarted, another process has that number: often this one
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
