"""Open files that anybody may have made: only regular ones, since reading a named pipe or a device has no end."""

from __future__ import annotations

import os
import stat

_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def only_regular(path: str, flags: int) -> int:
    """The ``opener`` of `open` for a file that must be regular; links are followed.

    Args:
        path: of the file.
        flags: of `os.open`.

    Raises:
        OSError: if it cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # a named pipe would wait for a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no regular file", path)
    return descriptor


def unusual_kind(mode: int) -> str | None:
    """What a file that is not regular is, such as "a named pipe"; None for a regular one.

    Args:
        mode: ``st_mode`` of the file.
    """
    if stat.S_ISREG(mode):
        return None
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
