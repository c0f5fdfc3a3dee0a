"""Records in a file of JSON lines, so that an interrupted benchmark can be continued."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, record: Record) -> None:
    """Append one record."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read(path: Path) -> list[Record]:
    """Return all records; none if there is no file. Incomplete lines are ignored."""
    records = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write(path: Path, records: Iterable[Record]) -> None:
    """Replace the file; it is removed if there are no records."""
    path.unlink(missing_ok=True)
    for record in records:
        append(path, record)
