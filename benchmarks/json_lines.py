"""Records in a file of JSON lines, so that an interrupted benchmark can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, record: Record) -> None:
    """Append one record, in one write, since several processes may do so."""
    path.parent.mkdir(exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, (json.dumps(record) + "\n").encode())
    finally:
        os.close(file)


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
