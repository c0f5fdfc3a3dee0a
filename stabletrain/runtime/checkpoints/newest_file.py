"""Find checkpoints that are single files, without importing torch, so that validation of a config is fast."""

from __future__ import annotations

from pathlib import Path

PATTERN = "*.ckpt"


def newest_files(folder: Path) -> list[Path]:
    """The ``*.ckpt`` files of a folder, the one that was written last first; of equal times, the last by name first.

    Sharded strategies write folders of that name; they are included. Links are not resolved.

    Args:
        folder: may be missing.

    Returns:
        Their paths; none of them is opened or verified.
    """
    found: list[tuple[int, Path]] = []
    for path in folder.glob(PATTERN):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except FileNotFoundError:  # deleted meanwhile, or a link to nothing
            continue
    return [path for _, path in sorted(found, reverse=True)]
