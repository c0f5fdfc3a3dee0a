"""The place where runs are kept: which one, making it once under a lock, and saying plainly what is wrong with it."""

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

# A full check of a small file costs milliseconds; MLflow itself retries a broken file for more than a minute.
_FULL_CHECK_BYTES = 64 * 2**20

_SQLITE_URI = re.compile(r"^(?P<head>sqlite(?:\+\w+)?:///)(?P<path>[^?]*)(?P<query>\?.*)?$")

_CAUSES = (
    ("locked", "another program holds it; end that program (or wait for it), or use another store"),
    ("not a database", "its content is damaged; move it away (a new one is made) or restore a backup"),
    ("malformed", "its content is damaged; move it away (a new one is made) or restore a backup"),
    ("readonly", "it cannot be written; give write permission to the file and its folder, or use another store"),
    ("unable to open", "it cannot be opened; give write permission to the file and its folder, or use another store"),
    ("disk is full", "the disk is full; make room, or use another store"),
    ("disk i/o error", "the disk fails to read or write it; check the disk, or use another store"),
    ("out-of-date", "an older MLflow made it; copy it, then run `mlflow db upgrade <uri>`, or use another store"),
    ("can't locate revision", "a newer MLflow made it; install that version of MLflow, or use another store"),
)


class StoreError(UserError):
    """The tracking store cannot be used; the message names it and says what to do."""


def default_tracking_uri() -> str:
    """Return the store used when none is named: ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the current folder.

    A relative sqlite path is made absolute, so that processes started elsewhere mean the same file.
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
    """Make the store ready for use: create a sqlite file, or migrate an old one, once, whoever comes first.

    Two processes that open a fresh file at once both run the migrations, and all but one die; so a lock file
    beside the database lets one pass at a time. An old database is copied to ``<file>.before-upgrade-<time>`` before
    its schema is upgraded. Stores that are servers are left alone.

    Args:
        uri: MLflow tracking URI.
        timeout: seconds to wait for a database that another program holds.

    Raises:
        StoreError: if the database is locked, damaged, not writable, or a file store (which MLflow 3 refuses).
    """
    path = sqlite_path(uri)
    if path is None:
        _refuse_file_store(uri)
        return
    with explained(uri), store_lock(uri), quiet_mlflow():
        _probe(path, timeout)
        _upgrade(uri, path)
        open_client(uri)


@contextmanager
def store_lock(uri: str, *, timeout: float = 120.0) -> Iterator[None]:
    """Hold the lock of a sqlite store (nothing for a server), so that only one process creates things in it.

    Args:
        uri: MLflow tracking URI.
        timeout: seconds to wait for another process's turn.

    Raises:
        StoreError: if the lock file cannot be made, or stays held for longer than ``timeout``.
    """
    from filelock import FileLock, Timeout

    path = sqlite_path(uri)
    if path is None:
        yield
        return
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=timeout)
        held.acquire()
    except Timeout:
        raise StoreError(
            f"tracking store: {lock} has been held by another process for more than {timeout:g} s; "
            f"wait for that process, or use another store (MLFLOW_TRACKING_URI or logger.tracking_uri)"
        ) from None
    except OSError as error:
        raise StoreError(
            f"tracking store: cannot write in {path.parent} ({error.strerror or error}); give write permission, "
            f"or use another store (MLFLOW_TRACKING_URI or logger.tracking_uri)"
        ) from None
    try:
        yield
    finally:
        held.release()


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what the user can mend in errors of the store into one `StoreError`; let every other error pass.

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
                    _message(uri, text, "the server does not answer; start it or correct the URI")
                ) from error
        raise


@contextmanager
def quiet_mlflow() -> Iterator[None]:
    """Keep MLflow's and alembic's lines about tables and migrations off the terminal; warnings still appear."""
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
            f"tracking store: {uri!r} is a folder, which MLflow 3 no longer writes to; expected a database such as "
            f"sqlite:////absolute/path/mlflow.db or a server's http(s) address; "
            f"change MLFLOW_TRACKING_URI or logger.tracking_uri (or set MLFLOW_ALLOW_FILE_STORE=true)"
        )


def _probe(path: Path, timeout: float) -> None:
    """Find out in one transaction whether the file can be read and written."""
    if path.is_dir():
        raise StoreError(f"tracking store: {path} is a folder; expected a database file; name another file")
    with closing(sqlite3.connect(path, timeout=timeout, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if path.stat().st_size <= _FULL_CHECK_BYTES:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(f"database disk image is malformed: {verdict.strip().splitlines()[-1]}")
        connection.execute("ROLLBACK")


def _upgrade(uri: str, path: Path) -> None:
    """Bring an older schema up to date, after making a copy (MLflow itself would do some upgrades without one)."""
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
        [sys.executable, "-m", "mlflow", "db", "upgrade", uri], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise StoreError(
            f"tracking store: database {path} was made by another version of MLflow and could not be upgraded: {last}: "
            f"install the MLflow that made it, run `mlflow db upgrade {uri}` yourself, or use another store "
            f"(MLFLOW_TRACKING_URI or logger.tracking_uri); a copy from before is {backup}"
        )
