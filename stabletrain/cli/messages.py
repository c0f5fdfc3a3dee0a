"""Printing of errors that the user can correct."""

from __future__ import annotations

import sys


def print_error(error: object) -> None:
    """Print an error to standard error, without a traceback.

    Args:
        error: its text has one line per mistake.
    """
    lines = str(error).splitlines() or [type(error).__name__]
    if len(lines) == 1:
        print(f"error: {lines[0]}", file=sys.stderr)
    else:
        count = len(getattr(error, "problems", lines))
        # as many as there are, not as many as are shown
        print(f"error: {count} mistakes", *(f"  {line}" for line in lines), sep="\n", file=sys.stderr)


def valid(recipe: str) -> str:
    """The line about a config without a mistake.

    Args:
        recipe: its name.
    """
    return f"{recipe}: the config composes, and everything that it names can be built"
