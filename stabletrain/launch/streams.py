"""Output that never ends a run: a closed terminal, a broken pipe or a full disk under a log is no reason to stop."""

from __future__ import annotations

import logging
import sys
from typing import Any


class Tolerant:
    """A text stream that stops writing once that fails, and shows characters that its encoding does not have escaped.

    Args:
        stream: where the text goes.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._is_broken = False

    def write(self, text: str) -> int:
        """Write a text, unless the stream is broken."""
        if not self._is_broken:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self.write(text.encode(encoding, "backslashreplace").decode(encoding))
            except (OSError, ValueError) as error:  # ValueError: the stream is closed
                self._give_up(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush, unless the stream is broken."""
        if not self._is_broken:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._is_broken = True
        logging.getLogger(__name__).warning("output is not printed any more: %s", error)

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        if name == "_stream":  # of a copy that is not complete yet
            raise AttributeError(name)
        return getattr(self._stream, name)


def tolerate_broken_output() -> None:
    """Replace the standard output and the standard error by streams that never raise an error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Tolerant):
            setattr(sys, name, Tolerant(stream))
