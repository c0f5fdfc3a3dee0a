"""The checkpoint files of a folder by time. Standard library only, so that it can be asked without importing torch."""

from __future__ import annotations

from pathlib import Path


def newest_files(folder: Path) -> list[Path]:
    """Return the ``*.ckpt`` files directly in a folder, the newest first; none if the folder is missing.

    Args:
        folder: the folder.
    """
    return sorted(folder.glob("*.ckpt"), key=lambda file: file.stat().st_mtime, reverse=True)
