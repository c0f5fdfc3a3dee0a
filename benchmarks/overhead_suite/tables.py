"""The rows of the table."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One line.

    Args:
        what: was measured.
        measured: with its unit.
        reach: what is to be reached; empty if nothing is.
        spread: of what was measured: its standard error, or quartiles.
    """

    what: str
    measured: str
    reach: str = ""
    spread: str = ""


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = ["| what | measured | required | spread |", "|---|---|---|---|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
