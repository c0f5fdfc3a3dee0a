"""Write the small files of a run's record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def as_json(record: Mapping[str, Any]) -> str:
    """Return the text of a JSON file.

    Args:
        record: of plain values.
    """
    return json.dumps(record, indent=2) + "\n"


def write_texts(folder: str | Path, texts: Mapping[str, str]) -> list[Path]:
    """Write files, each under another name first, so that a process that is killed leaves none in part.

    Args:
        folder: the folder to write to; made if missing.
        texts: by file name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8", errors="surrogatepass")
        part.replace(folder / name)
    return [folder / name for name in texts]
