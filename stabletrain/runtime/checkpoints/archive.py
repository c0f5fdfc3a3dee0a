"""What is wrong with a file that should be a checkpoint of ``torch.save``, as far as can be told without torch."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from stabletrain.runtime.records.regular_file import only_regular, unusual_kind

_PICKLE = b"\x80"
_NOT_A_ZIP = (zipfile.BadZipFile, ValueError, RuntimeError, EOFError, struct.error, OverflowError, LookupError)
DATA_ONLY = "checkpoints that hold anything but data are not read, because reading them could run code"


def file_problem(path: Path) -> str | None:
    """Why a file is not read as a checkpoint; None if it has the form of one.

    ``torch.save`` writes a zip file of uncompressed entries, one of which is ``data.pkl``. No entry is read here.

    Args:
        path: links are followed, as it is a path that the user gave.

    Returns:
        A clause that follows the path, such as "is a named pipe".
    """
    try:
        found = path.stat()
        kind = unusual_kind(found.st_mode)
        if kind is not None:
            return f"is {kind}, expected a file"
        with open(path, "rb", opener=only_regular) as file:
            return _content_problem(file, found.st_size)
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def _content_problem(file: BinaryIO, size: int) -> str | None:
    start = file.read(4)
    if start.startswith(_PICKLE):
        return (
            f"is a pickle, and {DATA_ONLY}; load it with torch.load in the environment that made it, and save it anew"
        )
    if not start.startswith(b"PK"):
        return "is not a checkpoint, or is truncated"
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except _NOT_A_ZIP:
        return "is not a checkpoint, or is truncated"
    names = [entry.filename for entry in entries]
    if any(_leads_outside(name) for name in names):
        return "is not a checkpoint: it holds a file whose name leads out of a folder"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return "is not a checkpoint: torch.save does not compress, and this file is compressed"
    if sum(entry.file_size for entry in entries) > size:
        return "is damaged: its entries are larger than the file"
    if any(name.endswith("/constants.pkl") for name in names):
        return f"is a TorchScript archive, and {DATA_ONLY}"
    if sum(name.endswith("/data.pkl") for name in names) != 1:
        return "is not a checkpoint: it is a zip file without a data.pkl"
    return None


def _leads_outside(name: str) -> bool:
    return name.startswith(("/", "\\")) or ":" in name.partition("/")[0] or ".." in name.replace("\\", "/").split("/")
