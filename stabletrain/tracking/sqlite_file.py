"""The file of a sqlite store: can it be used, is it MLflow's, what is its schema, and is it still the same file."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

from stabletrain.tracking.store_errors import OTHER_STORE, StoreError, sqlite_path

# checking a file of this size takes milliseconds, while MLflow retries a damaged one for more than a minute
_FULL_CHECK_BYTES = 64 * 2**20

# tables that every version of MLflow has
_MLFLOW_TABLES = frozenset(("experiments", "runs", "metrics", "params", "tags"))

_files: dict[Path, tuple[int, int]] = {}
"""Device and inode of each store that this process uses: sqlite goes on with a file that was deleted, and loses all."""


def probe(path: Path, timeout: float) -> None:
    """Read and write the file in one transaction; raises sqlite's error if that fails.

    Args:
        path: of the file; made if missing.
        timeout: seconds to wait for a database that another program has locked.

    Raises:
        StoreError: if it is no regular file.
    """
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise StoreError(f"tracking store: {path} is {what}; expected a database file {OTHER_STORE}")
    with closing(sqlite3.connect(path, timeout=timeout, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if path.stat().st_size <= _FULL_CHECK_BYTES:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(f"database disk image is malformed: {verdict.strip().splitlines()[-1]}")
        connection.execute("ROLLBACK")


def refuse_foreign(path: Path) -> None:
    """Refuse a database of another program; MLflow would add its own tables to it, or fail in the middle.

    Args:
        path: of the file.

    Raises:
        StoreError: if the file has tables, but not those of MLflow.
    """
    with closing(_read_only(path)) as connection:
        rows = connection.execute("SELECT name FROM sqlite_master WHERE type IN ('table', 'view')").fetchall()
        names = {name for (name,) in rows if not name.startswith("sqlite_")}
        if not names:
            return
        if not names >= _MLFLOW_TABLES:
            shown = ", ".join(repr(name) for name in sorted(names)[:5])
            raise StoreError(
                f"tracking store: {path} is a database of another program (tables: {shown}"
                f"{', ...' if len(names) > 5 else ''}); expected an MLflow database or a new file; nothing was "
                f"changed in it; use another store {OTHER_STORE}"
            )
        columns = {row[1] for row in connection.execute("PRAGMA table_info(runs)")}
        if "run_uuid" not in columns or not connection.execute("PRAGMA table_info(alembic_version)").fetchall():
            raise StoreError(
                f"tracking store: {path} has tables named as MLflow's, but not its schema: it is of another program, "
                f"or was left incomplete while it was made; move it away (a new one is created), or use another "
                f"store {OTHER_STORE}"
            )


def upgrade(uri: str, path: Path) -> None:
    """Upgrade an older schema after copying the file; MLflow itself would do some upgrades without a copy.

    Args:
        uri: MLflow tracking URI.
        path: of its file.

    Raises:
        StoreError: if that fails.
    """
    from mlflow.store.db import utils

    latest = getattr(utils, "_get_latest_schema_revision", lambda: None)()
    with closing(sqlite3.connect(path)) as connection:
        made = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone()
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone() if made else None
    if row is None or latest in (None, row[0]):
        return
    backup = path.with_name(f"{path.name}.before-upgrade-{time.strftime('%Y%m%d-%H%M%S')}")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(backup)) as target:
        source.backup(target)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mlflow", "db", "upgrade", uri], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise StoreError(
            f"tracking store: database {path} is of another version of MLflow and could not be upgraded: {last}: "
            f"install that version, run `mlflow db upgrade {uri}` yourself, or use another store "
            f"(MLFLOW_TRACKING_URI or logger.tracking_uri); a copy from before the upgrade is {backup}"
        )


def note_file(uri: str) -> None:
    """Remember which file a store is, for `check_file`.

    Args:
        uri: MLflow tracking URI.
    """
    path = sqlite_path(uri)
    if path is not None and path not in _files:
        found = path.stat()
        _files[path] = (found.st_dev, found.st_ino)


def check_file(uri: str, *, timeout: float = 1.0) -> None:
    """Raise if a store cannot be written now: deleted, replaced, read-only, or locked.

    sqlite itself writes to a deleted file without an error, and MLflow waits 20 seconds for a lock.

    Args:
        uri: MLflow tracking URI; of a server nothing is checked.
        timeout: seconds to wait for a database that another program has locked.

    Raises:
        StoreError: if the file is gone or is another one.
        sqlite3.Error: if it cannot be written.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    try:
        found = path.stat()
    except OSError as error:
        raise StoreError(f"tracking store: database {path} is gone ({error.strerror or error})") from None
    if not stat.S_ISREG(found.st_mode) or _files.get(path, (found.st_dev, found.st_ino)) != (
        found.st_dev,
        found.st_ino,
    ):
        raise StoreError(f"tracking store: {path} is another file than at the start")
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise StoreError(f"tracking store: database {path} cannot be written any more; grant write permission")
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=timeout, isolation_level=None)) as each:
        each.execute("BEGIN IMMEDIATE")
        each.execute("ROLLBACK")


def _read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
