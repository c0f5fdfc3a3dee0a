"""The tracking store: find it, create it under a lock, and translate its errors into messages for the user."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from stabletrain.errors import UserError

# checking a file of this size takes milliseconds, while MLflow retries a damaged one for more than a minute
_FULL_CHECK_BYTES = 64 * 2**20

_SQLITE_URI = re.compile(r"^(?P<head>sqlite(?:\+\w+)?:///)(?P<path>[^?]*)(?P<query>\?.*)?$")

_CAUSES = (
    ("locked", "another program has locked it; end that program (or wait for it), or use another store"),
    ("not a database", "its content is damaged; move it away (a new one is created) or restore a backup"),
    ("malformed", "its content is damaged; move it away (a new one is created) or restore a backup"),
    ("readonly", "it cannot be written; grant write permission to the file and its folder, or use another store"),
    ("unable to open", "it cannot be opened; grant write permission to the file and its folder, or use another store"),
    ("disk is full", "the disk is full; free some space, or use another store"),
    ("disk i/o error", "the disk fails to read or write it; check the disk, or use another store"),
    ("out-of-date", "an older MLflow created it; copy it, then run `mlflow db upgrade <uri>`, or use another store"),
    ("can't locate revision", "a newer MLflow created it; install that version of MLflow, or use another store"),
)


class StoreError(UserError):
    """The tracking store cannot be used; the message names the store, the cause and what to do."""


def default_tracking_uri() -> str:
    """Return the default store: ``MLFLOW_TRACKING_URI``, or else ``mlflow.db`` in the current folder.

    A relative sqlite path is made absolute, so that it names the same file in a process with another current folder.
    """
    return absolute_uri(os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db")


def absolute_uri(uri: str) -> str:
    """Return ``uri`` with a relative sqlite path resolved against the current folder.

    Args:
        uri: any MLflow tracking URI.

    >>> absolute_uri("sqlite:////data/mlflow.db")
    'sqlite:////data/mlflow.db'
    >>> absolute_uri("http://localhost:5000")
    'http://localhost:5000'
    """
    match, path = _SQLITE_URI.match(uri), sqlite_path(uri)
    if match is None or path is None:
        return uri
    return f"{match['head']}{path}{match['query'] or ''}"


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite store's file, or None for any other kind of store.

    >>> sqlite_path("sqlite:////data/mlflow.db")
    PosixPath('/data/mlflow.db')
    >>> sqlite_path("http://localhost:5000") is None
    True
    """
    match = _SQLITE_URI.match(uri)
    if match is None or match["path"] in ("", ":memory:"):
        return None
    return Path(match["path"]).absolute()


def ensure_store(uri: str, *, timeout: float = 10.0) -> None:
    """Make the store ready for use: create a sqlite file, or migrate an old one, under a lock.

    If several processes open a new file at once, all of them run the migrations, and all but one fail; a lock file
    beside the database prevents this. An old database is copied to ``<file>.before-upgrade-<time>`` before its schema
    is upgraded. Stores that are servers are not changed.

    Args:
        uri: MLflow tracking URI.
        timeout: seconds to wait for a database that another program has locked.

    Raises:
        StoreError: if the database is locked, damaged, not writable, or a file store (which MLflow 3 refuses).
    """
    path = sqlite_path(uri)
    if path is None:
        _refuse_file_store(uri)
        return
    with translate_errors(uri), store_lock(uri), quiet_mlflow():
        _probe(path, timeout)
        _upgrade(uri, path)
        open_client(uri)


@contextmanager
def store_lock(uri: str, *, timeout: float = 120.0) -> Iterator[None]:
    """Acquire the lock of a sqlite store, so that only one process creates objects in it; no lock for a server.

    Args:
        uri: MLflow tracking URI.
        timeout: seconds to wait for another process.

    Raises:
        StoreError: if the lock file cannot be created, or another process has the lock for longer than ``timeout``.
    """
    from filelock import FileLock, Timeout

    path = sqlite_path(uri)
    if path is None:
        yield
        return
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        acquired = FileLock(lock, timeout=timeout)
        acquired.acquire()
    except Timeout:
        raise StoreError(
            f"tracking store: another process has locked {lock} for more than {timeout:g} s; wait for that process, "
            f"or use another store (MLFLOW_TRACKING_URI or logger.tracking_uri)"
        ) from None
    except OSError as error:
        raise StoreError(
            f"tracking store: cannot write to {path.parent} ({error.strerror or error}); grant write permission, "
            f"or use another store (MLFLOW_TRACKING_URI or logger.tracking_uri)"
        ) from None
    try:
        yield
    finally:
        acquired.release()


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Replace errors of the store that the user can correct by a `StoreError`; other errors are unchanged.

    Args:
        uri: MLflow tracking URI, named in the message.
    """
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        text = str(error)
        if isinstance(error, sqlite3.Error) or type(error).__module__.startswith(("sqlalchemy", "mlflow", "alembic")):
            for word, advice in _CAUSES:
                if word in text.lower():
                    raise StoreError(_message(uri, text, advice)) from error
            if "connection" in text.lower() or "max retries" in text.lower():
                raise StoreError(
                    _message(uri, text, "the server does not respond; start it or correct the URI")
                ) from error
        raise


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Suppress MLflow's and alembic's messages about tables and migrations; warnings still appear."""
    loggers = [logging.getLogger(name) for name in ("mlflow", "mlflow.store.db.utils", "alembic")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def open_client(uri: str) -> Any:
    """Return an ``mlflow.MlflowClient`` for a store that `ensure_store` has made ready.

    Args:
        uri: MLflow tracking URI.
    """
    with quiet_mlflow():
        from mlflow import MlflowClient

        return MlflowClient(uri)


def _message(uri: str, text: str, advice: str) -> str:
    path = sqlite_path(uri)
    what = f"database {path}" if path is not None else uri
    first_line = text.strip().splitlines()[0]
    return f"tracking store: {what}: {first_line}: {advice} (MLFLOW_TRACKING_URI or logger.tracking_uri)"


def _refuse_file_store(uri: str) -> None:
    is_folder = uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "uc"))
    allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("1", "true")
    if is_folder and not allowed and not uri.startswith(("databricks", "sqlite")):
        raise StoreError(
            f"tracking store: {uri!r} is a folder, which MLflow 3 does not support; expected a database such as "
            f"sqlite:////absolute/path/mlflow.db or a server's http(s) address; "
            f"change MLFLOW_TRACKING_URI or logger.tracking_uri (or set MLFLOW_ALLOW_FILE_STORE=true)"
        )


def _probe(path: Path, timeout: float) -> None:
    """Read and write the file in one transaction; raises sqlite's error if that fails."""
    if path.is_dir():
        raise StoreError(f"tracking store: {path} is a folder; expected a database file")
    with closing(sqlite3.connect(path, timeout=timeout, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if path.stat().st_size <= _FULL_CHECK_BYTES:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(f"database disk image is malformed: {verdict.strip().splitlines()[-1]}")
        connection.execute("ROLLBACK")


def _upgrade(uri: str, path: Path) -> None:
    """Upgrade an older schema after copying the file; MLflow itself would do some upgrades without a copy."""
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
