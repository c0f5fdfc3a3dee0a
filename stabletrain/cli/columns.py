"""A curve as text: columns of blocks, for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_EIGHTHS = " ▁▂▃▄▅▆▇█"


def columns(values: Sequence[float], height: int = 4, *, blocks: bool | None = None) -> list[str]:
    """Return lines that show values as columns over zero, the largest as high as all lines.

    Args:
        values: at least 0.
        height: lines.
        blocks: draw with eighths of a block; otherwise with ``#``; None: with blocks if standard output can show them.

    >>> columns([0, 1, 2], height=1, blocks=True), columns([0, 1, 2], height=2, blocks=False)
    ([' ▄█'], ['  #', ' ##'])
    """
    if blocks is None:
        blocks = _can_show(_EIGHTHS)
    largest = max(values, default=0.0) or 1.0
    parts = 8 if blocks else 1
    filled = [round(each / largest * height * parts) for each in values]
    filled = [max(n, 1) if each > 0 and blocks else n for n, each in zip(filled, values, strict=True)]
    marks = _EIGHTHS if blocks else " #"
    return [
        "".join(marks[min(max(n - row * parts, 0), parts)] for n in filled).rstrip() for row in reversed(range(height))
    ]


def _can_show(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
