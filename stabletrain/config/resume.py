"""Find the checkpoint of a path by file names: no checkpoint is read, and torch is not imported."""

from __future__ import annotations

from pathlib import Path

from stabletrain.runtime.checkpoints.newest_file import newest_files
from stabletrain.runtime.records.run_files import CHECKPOINTS


def checkpoint_of(resume: str) -> Path | None:
    """Return the checkpoint that the config key ``resume`` means; None if there is none.

    Args:
        resume: path of a checkpoint (a file, or a folder written by a sharded strategy) or of a run's folder.
    """
    path = Path(resume).expanduser().absolute()
    if (path / CHECKPOINTS).is_dir():
        return checkpoint_of_run(path)
    return path if path.exists() else None


def checkpoint_of_run(folder: Path) -> Path | None:
    """Return the checkpoint from which a run can be resumed; None if there is none.

    Args:
        folder: the run's folder.

    Returns:
        The newest ``.ckpt`` file, symbolic links resolved. If the folder holds verified checkpoints, the
        folder that contains them: the newest undamaged one is chosen when it is loaded.
    """
    checkpoints = folder / CHECKPOINTS
    if any(checkpoints.glob("step-*/manifest.json")):
        return checkpoints
    found = newest_files(checkpoints)
    return found[0].resolve() if found else None
