"""Text and JSON files of limited size, from anywhere: shown without effects on a terminal, read without surprises."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from pathlib import Path
from typing import Any, TypeGuard

from stabletrain.runtime.records.regular_file import only_regular

MAX_MESSAGE = 2_000
"""Longest message of a result, in characters; a longer one is cut in its middle."""

_MAX_FILE = 4_000_000


def one_message(text: str, limit: int = MAX_MESSAGE) -> str:
    """Return a text that any terminal can show: control characters and broken Unicode escaped, cut in the middle.

    Args:
        text: any text.
        limit: in characters.

    >>> one_message("a bell \\x07 and half a character \\udc80")
    'a bell \\\\x07 and half a character \\\\udc80'
    >>> one_message("0123456789" * 4, limit=24)
    '01234567 [...] 123456789'
    """
    text = _cut(text, limit)  # escaping megabytes would take long
    shown = "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else f"\\x{ord(c):02x}" for c in text)
    return _cut(shown.encode("utf-8", "backslashreplace").decode("utf-8"), limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    mark = " [...] "
    left = (limit - len(mark)) // 2
    return text[:left] + mark + text[-(limit - len(mark) - left) :]


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically: it is replaced as a whole, or unchanged if it cannot be written.

    Args:
        path: of the file; its folder exists.
        content: that JSON can represent; numbers that it cannot are written as "NaN", "Infinity", "-Infinity".

    Raises:
        OSError: if it cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    return content


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Args:
        path: of a regular file of at most 4 MB.

    Raises:
        OSError: if it cannot be read, or is no regular file.
        ValueError: if it is too large, or not JSON.
    """
    with open(path, "rb", opener=only_regular) as file:
        content = file.read(_MAX_FILE + 1)
    if len(content) > _MAX_FILE:
        raise ValueError(f"{path}: expected at most {_MAX_FILE} bytes")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number from 0 to 2**63 - 1, and not a bool.

    Args:
        value: any.
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
