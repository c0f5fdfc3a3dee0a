"""One file of ``torch.save`` from a verified checkpoint, however many processes have written it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.loading import load_good
from stabletrain.runtime.checkpoints.names import plain_name


class Consolidated(NamedTuple):
    """A file that was written.

    Args:
        file: its path.
        checkpoint: the folder of the checkpoint that was read.
        step: applied steps in it.
    """

    file: Path
    checkpoint: Path
    step: int


def consolidate(path: str | Path, target: str | Path | None = None, everything: bool = False) -> Consolidated:
    """Write the weights of a checkpoint to one file, for ``load_state_dict`` of the module in one process.

    Args:
        path: as for `load`: a checkpoint, a folder of checkpoints or a run's folder, for the newest good one.
        target: the file, which must not exist; None: beside the checkpoint, with its name and ``.pt``.
        everything: the whole checkpoint in Lightning's form, for ``load_from_checkpoint`` and ``ckpt_path``, instead of
            the weights.

    Returns:
        The file, which ``torch.load(file, weights_only=True)`` reads.

    Raises:
        CheckpointError: if there is no good checkpoint, or the file exists or cannot be written.
    """
    found = load_good(path)
    file = Path(target) if target is not None else found.path.with_name(f"{found.path.name}.pt")
    content = found.checkpoint if everything else _weights(found.checkpoint)
    if os.path.lexists(file):
        raise CheckpointError(f"consolidate: {file} already exists; choose another file, or delete it")
    half = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, half)
        half.rename(file)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a folder that cannot be written
        half.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise CheckpointError(f"consolidate: cannot write {file} ({reason}); choose another file") from None
    return Consolidated(file, found.path, found.manifest.info.step)


def _weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        raise CheckpointError("consolidate: the checkpoint holds no weights (state_dict)")
    return {plain_name(name) if isinstance(name, str) else name: each for name, each in state.items()}
