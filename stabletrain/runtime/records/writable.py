"""Whether files and folders that a user names can be written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def unwritable(path: str, *, folder: bool, parents: bool = False) -> str | None:
    """Return why a file or folder cannot be written, without making anything; None if it probably can.

    Args:
        path: of the file or folder.
        folder: whether it is a folder.
        parents: whether a folder directly below the root may be missing, too: a mistyped path usually begins there.
    """
    if not path.strip():
        return f"expected a path, got {path!r}"
    try:
        wanted = Path(path).expanduser().absolute()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.lstat(wanted)  # raises for a name that is too long
        existing = next(each for each in (wanted, *wanted.parents) if os.path.lexists(each))
    except (OSError, ValueError, RuntimeError) as error:
        return f"expected a path, got {path!r:.200} ({error})"
    if existing != wanted and not existing.is_dir():
        return f"cannot write to {wanted} ({existing} is no folder)"
    if not parents and existing == Path(existing.anchor) and existing not in (wanted, wanted.parent):
        return f"cannot write to {wanted} (there is no folder {wanted.parents[-2]}; make it)"
    if existing == wanted and (not wanted.is_dir() if folder else not wanted.is_file()):
        return f"cannot write to {wanted} (it is there already, and no {'folder' if folder else 'file'})"
    if not os.access(existing, os.W_OK | (os.X_OK if existing.is_dir() else 0)):
        return f"cannot write to {wanted} (no permission for {existing})"
    return None
