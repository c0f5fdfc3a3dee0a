"""What two runs must have in common at the end, to be compared bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stabletrain.runtime.checkpoints import load


def final_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a folder, without the identity of the run, which is drawn at random at each start."""
    checkpoint = load(folder)
    del checkpoint["callbacks"]["save_checkpoints"]
    return checkpoint
