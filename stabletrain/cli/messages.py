"""How a user's mistake is said."""

from __future__ import annotations

import sys


def complain(error: object) -> None:
    """Print a mistake on standard error: one message, no traceback.

    Args:
        error: what is wrong, one line per thing to put right.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    if len(lines) == 1:
        print(f"error: {lines[0]}", file=sys.stderr)
    else:
        print(f"error: {len(lines)} things to put right", *(f"  {line}" for line in lines), sep="\n", file=sys.stderr)
