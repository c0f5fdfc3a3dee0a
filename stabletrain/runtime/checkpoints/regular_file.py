"""Open the files of a checkpoint: only regular ones, so that no pipe is waited for and no link leads elsewhere."""

from __future__ import annotations

import io
import os
from pathlib import Path

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.records.regular_file import unusual_kind

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file to read its bytes, without buffering.

    Raises:
        CheckpointError: if it is missing, cannot be opened, or is anything else, also a symbolic link.
    """
    size_of(path)  # before it is opened: opening some devices has effects
    try:
        file = io.FileIO(os.open(path, _FLAGS), "rb")
    except OSError as error:
        raise _unreadable(path, error) from None
    try:
        _require_regular(path, os.fstat(file.fileno()))
    except CheckpointError:
        file.close()
        raise
    return file


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file.

    Args:
        path: the file.
        limit: its largest size, bytes; a larger one is not read.

    Raises:
        CheckpointError: as `open_regular`, or if it is larger.
    """
    pieces: list[bytes] = []
    read = 0
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            while size <= limit and (piece := file.read(min(limit + 1 - read, 4 << 20))):
                pieces.append(piece)
                read += len(piece)
        except OSError as error:
            raise _unreadable(path, error) from None
    if max(size, read) > limit:
        raise CheckpointError(f"{path.name} has {max(size, read)} bytes, expected at most {limit}")
    return b"".join(pieces)


def size_of(path: Path) -> int:
    """The size of a regular file, bytes; it is not opened.

    Raises:
        CheckpointError: if it is missing, or is anything else.
    """
    try:
        found = path.lstat()
    except OSError as error:
        raise _unreadable(path, error) from None
    _require_regular(path, found)
    return found.st_size


def _require_regular(path: Path, found: os.stat_result) -> None:
    kind = unusual_kind(found.st_mode)
    if kind is not None:
        raise CheckpointError(f"{path.name} is {kind}, expected a regular file")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CheckpointError(f"{path.name} is missing")
    return CheckpointError(f"{path.name} cannot be read ({error.strerror})")
