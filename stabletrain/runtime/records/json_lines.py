"""A file of JSON lines that survives a full disk, a kill in the middle of a line, and damage; standard library only.

A line that was cut is kept, and ended by a mark when the next one is written. Reading gives the whole records, and
names the places where something else stands.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stabletrain.runtime.records.regular_file import only_regular

logger = logging.getLogger("stabletrain")

CUT = " <- incomplete: the process was ended while it wrote this line"

_MAX_WAITING = 10_000
"""Maximum number of waiting lines; beyond it the oldest are lost."""

_MAX_LINE = 64 * 2**20
"""Maximum length of a line in bytes; a longer one counts as damaged."""


class JsonLines:
    """Appends whole lines; the file is created with the first one. Several processes may append.

    Args:
        path: of the file; None: write nothing (as on ranks other than 0).
        what: name of the lines for the message, such as ``"events"``.
    """

    def __init__(self, path: Path | None, what: str) -> None:
        self.path, self._what = path, what
        self._waiting: deque[str] = deque(maxlen=_MAX_WAITING)
        self._has_written = False

    def append(self, line: str) -> None:
        """Write the waiting lines and this one. Log a warning at the first failure after a success."""
        if self.path is None:
            return
        was_failing = bool(self._waiting)
        self._waiting.append(line + "\n")
        try:
            if self._has_written and not self.path.exists():
                logger.warning("%s was removed during the run; a new file is begun", self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_lines(self.path, "".join(self._waiting))
            self._waiting.clear()
            self._has_written = True
        except OSError as error:
            self._has_written = False
            if not was_failing:
                logger.warning(
                    "%s cannot be written to %s: %s; they stay in memory until a later write succeeds",
                    self._what,
                    self.path,
                    error,
                )


class Line(NamedTuple):
    """A place in a file of JSON lines.

    Args:
        number: of the line, from 1.
        record: the JSON object; None: something else stands there.
        text: the damaged text, at most 1000 characters; empty for a record.
    """

    number: int
    record: dict[str, Any] | None
    text: str = ""


def append_lines(path: Path, text: str) -> None:
    """Append whole lines in one write; an incomplete last line of the file is ended with a mark first.

    A symbolic link is refused, so that a file planted in a run's folder cannot lead outside.

    Args:
        path: of the file; made if missing.
        text: lines, each with its newline.

    Raises:
        OSError: if the text could not be written as a whole; none of it is in the file then.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        found = os.fstat(descriptor)
        size = found.st_size if stat.S_ISREG(found.st_mode) else 0
        content = (_end_of_cut_line(descriptor, size) + text).encode("utf-8", "backslashreplace")
        written = 0
        try:
            while written < len(content):
                written += os.write(descriptor, content[written:])
        except OSError:
            # remove an incomplete line, unless another process has written behind it
            if written and os.fstat(descriptor).st_size == size + written:
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the records of a file and its damaged places, in order; blank lines are left out.

    Damaged is what is no JSON object: a cut line, NUL bytes (which a file system may leave after a power loss; a record
    behind them is read), bytes that are no UTF-8, other JSON values, lines of more than 64 MiB.

    Args:
        path: of the file.

    Raises:
        OSError: if it cannot be read, or is no regular file.
    """
    with open(path, "rb", opener=only_regular) as file:
        number = 0
        while line := file.readline(_MAX_LINE):
            number += 1
            if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                yield Line(number, None, _shown(line))
                while (rest := file.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                continue
            for part in re.split(rb"(\0+)", line):
                if part.strip():
                    record = None if part.startswith(b"\0") else _object(part)
                    yield Line(number, record, "" if record is not None else _shown(part))


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _shown(text: bytes) -> str:
    return text[:1000].decode("utf-8", "replace").strip()


def _end_of_cut_line(descriptor: int, size: int) -> str:
    """What ends an incomplete last line: nothing if there is none, else a newline, behind a mark if it is cut."""
    if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
        return ""
    start = max(0, size - _MAX_LINE)
    tail = os.pread(descriptor, size - start, start)
    last = tail[tail.rfind(b"\n") + 1 :]
    return "\n" if _object(last.strip(b"\0")) is not None else f"{CUT}\n"
