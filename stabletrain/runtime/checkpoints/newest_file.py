"""Find checkpoints that are single files, without importing torch, so that validation of a config is fast."""

from __future__ import annotations

import stat
from pathlib import Path

PATTERN = "*.ckpt"


def newest_files(folder: Path) -> list[Path]:
    """The ``*.ckpt`` files of a folder, the one that was written last first; of equal times, the last by name first.

    Sharded strategies write folders of that name; they are included. Links are not resolved.

    Args:
        folder: may be missing.

    Returns:
        Their paths; none of them is opened or verified. Pipes, sockets and devices are left out.
    """
    found: list[tuple[int, Path]] = []
    for path in folder.glob(PATTERN):
        try:
            known = path.stat()
        except OSError:  # deleted meanwhile, or a link to nothing or to itself
            continue
        if stat.S_ISREG(known.st_mode) or stat.S_ISDIR(known.st_mode):
            found.append((known.st_mtime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]
