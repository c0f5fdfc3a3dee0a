"""The final state of a run, for a comparison bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stabletrain.runtime.checkpoints import load


def final_checkpoint(folder: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a folder, without the run's identity, which is random."""
    checkpoint = load(folder)
    del checkpoint["callbacks"]["save_checkpoints"]
    return checkpoint
