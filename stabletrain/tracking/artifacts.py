"""Copy files to a run's artifacts; a store or a run's folder from elsewhere decides neither what is read nor written.

Where a run's artifacts are is written in the store, and may be a local folder: MLflow's client writes there. A link in
a run's folder may lead to any file of the user.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from stabletrain.runtime.records.run_files import ENVIRONMENT
from stabletrain.tracking.sqlite_file import check_file
from stabletrain.tracking.store import open_client
from stabletrain.tracking.store_errors import StoreError, sqlite_path, translate_errors

_ALLOWED = "MLFLOW_DEFAULT_ARTIFACT_ROOT"
"""MLflow's own variable for its server, names a folder in which artifacts may lie."""


RESUMES = "stabletrain.resumes"
"""Tag with the number of times that a run was resumed."""


def segment_of(tags: Mapping[str, str]) -> str:
    """Return the folder of the artifacts of a run's newest part: empty at first, then ``resume-1`` and so on.

    Args:
        tags: of the run.
    """
    return f"resume-{tags[RESUMES]}" if tags.get(RESUMES) else ""


def require_safe_artifacts(client: Any, run_id: str) -> None:
    """Refuse a run whose artifacts are in a local folder that the store alone has chosen.

    Args:
        client: of MLflow.
        run_id: the run.

    Raises:
        StoreError: see `require_safe_location`.
    """
    require_safe_location(client.tracking_uri, client.get_run(run_id).info.artifact_uri)


def require_safe_location(uri: str, location: str) -> None:
    """Refuse a local folder outside of the folder of the database, the current folder, and the one in the environment.

    Args:
        uri: MLflow tracking URI of the store.
        location: of an experiment's or a run's artifacts; a server's or bucket's address is accepted.

    Raises:
        StoreError: if it is refused.
    """
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    if not is_local_uri(location):
        return
    database = sqlite_path(uri)
    roots = [Path.cwd(), *([database.parent] if database is not None else [])]
    if os.environ.get(_ALLOWED):
        roots.append(Path(local_file_uri_to_path(os.environ[_ALLOWED])))
    try:
        folder = Path(local_file_uri_to_path(location)).resolve()
        is_safe = any(folder.is_relative_to(root.resolve()) for root in roots)
    except (ValueError, OSError, RuntimeError):
        is_safe = False
    if not is_safe:
        raise StoreError(
            f"tracking store: {uri} would have the artifacts written to {location!r}, which is outside of its own "
            f"folder; choose another experiment (logger.experiment) or store (logger.tracking_uri), or, if the folder "
            f"is right, set {_ALLOWED} to it"
        )


def upload_files(uri: str, run_id: str, paths: Iterable[str | Path]) -> None:
    """Copy files and folders to a run's artifacts; only regular files, and nothing that a link leads to.

    The record of a run's newest part (``environment/``) goes to the folder of that part, see `segment_of`.

    Args:
        uri: MLflow tracking URI.
        run_id: the run.
        paths: those that do not exist are skipped.

    Raises:
        StoreError: if the store cannot be used.
    """
    found = [(file, parent) for path in map(Path, paths) for file, parent in _files(path)]
    if not found:
        return
    with translate_errors(uri):
        check_file(uri, timeout=5.0)
        client = open_client(uri)
        run = client.get_run(run_id)
        require_safe_location(client.tracking_uri, run.info.artifact_uri)
        segment = segment_of(run.data.tags)
        for file, parent in found:
            if parent is not None and segment and PurePosixPath(parent).parts[0] == ENVIRONMENT:
                parent = f"{segment}/{parent}"
            client.log_artifact(run_id, str(file), artifact_path=parent)


def write_artifact(client: Any, run_id: str, path: str | Path, name: str | None = None) -> None:
    """Copy a file or folder that the user names to a run's artifacts under ``name``; None: its own name.

    Args:
        client: of MLflow.
        run_id: the run.
        path: of the file or folder; links are followed.
        name: of the artifact.

    Raises:
        StoreError: see `require_safe_location`.
    """
    require_safe_artifacts(client, run_id)
    source = Path(path)
    target = PurePosixPath(name or source.name)
    parent = None if str(target.parent) == "." else str(target.parent)
    if source.is_dir():
        client.log_artifacts(run_id, str(source), artifact_path=str(target))
    elif target.name == source.name:
        client.log_artifact(run_id, str(source), artifact_path=parent)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            link = Path(scratch) / target.name
            link.symlink_to(source.resolve())
            client.log_artifact(run_id, str(link), artifact_path=parent)


def _files(path: Path) -> Iterator[tuple[Path, str | None]]:
    """The regular files at or below a path, with the artifact folder of each."""
    if _is_regular(path):
        yield path, None
    elif path.is_dir() and not path.is_symlink():
        for folder, _, names in os.walk(path):  # does not follow links
            below = PurePosixPath(path.name, *Path(folder).relative_to(path).parts)
            yield from ((Path(folder, name), str(below)) for name in sorted(names) if _is_regular(Path(folder, name)))


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False
