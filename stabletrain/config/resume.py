"""Find the checkpoint of a path and say what is wrong with it, without reading its tensors and without torch."""

from __future__ import annotations

from pathlib import Path

from stabletrain.runtime.checkpoints.archive import file_problem
from stabletrain.runtime.checkpoints.errors import CheckpointError
from stabletrain.runtime.checkpoints.manifest import NAME as MANIFEST
from stabletrain.runtime.checkpoints.manifest import Manifest
from stabletrain.runtime.checkpoints.newest_file import newest_files
from stabletrain.runtime.records.run_files import CHECKPOINTS

_EXPECTED = "expected a .ckpt file, a checkpoint's folder, or the folder of a run"
_OF_STRATEGIES = (".metadata", "meta.pt", "latest", "checkpoint")
"""Names of which the folders hold one that sharded strategies (FSDP, DeepSpeed) write as checkpoints."""


def checkpoint_of(resume: str) -> Path | None:
    """Return the checkpoint that the config key ``resume`` means; None if there is none.

    Args:
        resume: path of a checkpoint (a file, or a folder written by a sharded strategy) or of a run's folder.
    """
    try:
        path = Path(resume).expanduser().absolute()
        if (path / CHECKPOINTS).is_dir():
            damaged = newest_files(path / CHECKPOINTS)[:1]  # so that what is wrong with it can be said
            return checkpoint_of_run(path) or (damaged[0].resolve() if damaged else None)
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long, forbidden, of a user that does not exist, with a NUL
        return None


def checkpoint_of_run(folder: Path) -> Path | None:
    """Return the checkpoint from which a run can be resumed; None if there is none.

    Args:
        folder: the run's folder.

    Returns:
        The newest ``.ckpt`` file that has the form of one (a full disk truncates it), symbolic links resolved. If the
        folder holds verified checkpoints, the folder that contains them: the newest undamaged one is chosen when it
        is loaded.
    """
    checkpoints = folder / CHECKPOINTS
    if verified_in(checkpoints):
        return checkpoints
    found = (path for path in newest_files(checkpoints) if path.is_dir() or file_problem(path) is None)
    newest = next(found, None)
    return newest.resolve() if newest else None


def resume_problem(resume: str) -> str | None:
    """What is wrong with the config key ``resume``, as one sentence; None if it names a checkpoint.

    Of verified checkpoints the manifests and the sizes of the files are checked, of a single file its form. Their
    content is checked when it is loaded.

    Args:
        resume: its value.
    """
    if "://" in resume:
        return f"expected a path, got the URL {resume!r}: download the checkpoint first"
    path = checkpoint_of(resume)
    if path is None:
        return f"there is no checkpoint at {resume!r}; {_EXPECTED}"
    if not path.is_dir():
        problem = file_problem(path)
        return problem and f"{path} {problem}; {_EXPECTED}"
    verified = [path] if (path / MANIFEST).exists() or path.name.startswith("step-") else verified_in(path)
    if verified:
        return _damage(path, verified)
    if any((path / name).exists() for name in _OF_STRATEGIES):
        return None
    return f"the folder {path} is no checkpoint and holds none; {_EXPECTED}"


def _damage(path: Path, verified: list[Path]) -> str | None:
    """The damage of the newest checkpoint, if all are damaged; reading falls back to any other."""
    siblings = verified_in(path.parent) if verified == [path] else []
    problem = None
    for each in [*verified, *reversed(siblings)]:
        try:
            found = Manifest.read(each.resolve() if each == path else each).missing(each)
        except CheckpointError as error:
            found = str(error)
        if found is None:
            return None
        problem = problem or f"{each.name} in {path.parent} is damaged: {found}"
    return f"{problem}; there is no other to read instead: use another checkpoint"


def verified_in(folder: Path) -> list[Path]:
    """Return the verified checkpoints of a folder, by name, the last first.

    Args:
        folder: of checkpoints.
    """
    return sorted((each.parent for each in folder.glob(f"step-*/{MANIFEST}")), reverse=True)
