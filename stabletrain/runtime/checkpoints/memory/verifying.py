"""Whether the bytes of a copy in memory are those that were written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import xxhash

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.manifest import NAME, Manifest
from stabletrain.runtime.checkpoints.regular_file import open_regular

_PIECE = 8 << 20


def problem_of(folder: Path, files: Iterable[str]) -> str:
    """What is damaged in a copy; empty if nothing is.

    Args:
        folder: of the copy.
        files: that it must have; the checksums of all but the manifest are in the manifest.
    """
    try:
        manifest = Manifest.read(folder)
        for name in files:
            if name == NAME:
                continue
            record = manifest.files.get(name)
            if record is None:
                return f"{name} is not in its manifest"
            if _checksum(folder / name) != record.xxh3_128:
                return f"{name} does not match its checksum"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open_regular(file) as opened:
        while piece := opened.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
