"""The files of a run's record that the process writes which trains; those of a script lie in the artifacts alone."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabletrain.runtime.records.run_files import CODE, DATA, ENVIRONMENT
from stabletrain.tracking.artifacts import upload_files
from stabletrain.tracking.code_files import code_record, named_packages
from stabletrain.tracking.git_record import git_record, write_git
from stabletrain.tracking.json_files import as_json, write_texts
from stabletrain.tracking.record import environment, write_process

if TYPE_CHECKING:
    from stabletrain.tracking.start_record import StartRecord


def write_built(folder: Path, record: Mapping[str, Any], packages: Collection[str]) -> None:
    """Write environment.json, requirements.txt and code.json.

    Args:
        folder: of the record.
        record: from `stabletrain.tracking.environment`.
        packages: whose code is recorded.
    """
    write_process(folder, record)
    write_texts(folder, {CODE: as_json(code_record(packages))})


def write_start(folder: Path, start: StartRecord) -> None:
    """Write data.json, and environment.json as it is at the first batch.

    Args:
        folder: of the record.
        start: from `stabletrain.tracking.start_record.record_start`.
    """
    write_process(folder, start.environment)
    write_texts(folder, {DATA: as_json(start.data)})


def upload_own_record(uri: str, run_id: str) -> None:
    """Write the environment of this process, its code and the state in git to the artifacts of a run.

    Args:
        uri: MLflow tracking URI.
        run_id: the run.
    """
    packages = named_packages({})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / ENVIRONMENT
        write_built(folder, environment(), packages)
        write_git(folder, git_record(Path.cwd(), packages))
        upload_files(uri, run_id, [folder])
