"""The tracking store: find it, create it under a lock, and translate its errors into messages for the user."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from stabletrain.extras import require
from stabletrain.tracking.sqlite_file import note_file, probe, refuse_foreign, upgrade
from stabletrain.tracking.store_errors import OTHER_STORE, SQLITE_URI, StoreError, sqlite_path, translate_errors

_SERVER_LIMITS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
"""For requests to a server: MLflow's own limits (7 and 120 s) let an unreachable one hold up a run for minutes."""


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
    match, path = SQLITE_URI.match(uri), sqlite_path(uri)
    if match is None or path is None:
        return uri
    return f"{match['head']}{path}{match['query'] or ''}"


def ensure_store(uri: str, *, timeout: float = 10.0) -> None:
    """Make the store ready for use: create a sqlite file, or migrate an old one, under a lock.

    If several processes open a new file at once, all of them run the migrations, and all but one fail; a lock file
    beside the database prevents this. An old database is copied to ``<file>.before-upgrade-<time>`` before its schema
    is upgraded. Stores that are servers are not changed.

    Args:
        uri: MLflow tracking URI.
        timeout: seconds to wait for a database that another program has locked.

    Raises:
        StoreError: if the database is locked, damaged, not writable, or of another program; or if the URI is a file
            store (which MLflow 3 refuses) or none that MLflow knows.
        UserError: if MLflow is not installed.
    """
    path = sqlite_path(uri)
    if path is None:
        require("mlflow", "a tracking store")
        _refuse_file_store(uri)
        return
    import_store(uri)  # before the lock: it takes seconds, for which others would wait, one after the other
    with translate_errors(uri), store_lock(uri), quiet_mlflow():
        probe(path, timeout)
        refuse_foreign(path)
        upgrade(uri, path)
        open_client(uri)


def import_store(uri: str | None) -> None:
    """Import MLflow, and what it needs for a store.

    Args:
        uri: MLflow tracking URI; None: `default_tracking_uri`.

    Raises:
        UserError: if MLflow is not installed.
    """
    require("mlflow", "a tracking store")
    is_file = sqlite_path(uri or default_tracking_uri()) is not None
    with quiet_mlflow():
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store" if is_file else "mlflow")


def require_store(uri: str) -> None:
    """Refuse a sqlite file that does not exist: what only reads makes no database.

    Args:
        uri: MLflow tracking URI.

    Raises:
        StoreError: if there is none.
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise StoreError(
            f"there is no tracking store {uri}; name a run's folder, go to the folder of mlflow.db, or set "
            "MLFLOW_TRACKING_URI"
        )


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

    Raises:
        StoreError: if MLflow does not know this kind of store, or lacks a package for it.
        UserError: if MLflow is not installed.
    """
    require("mlflow", "a tracking store")
    for name, value in _SERVER_LIMITS.items():
        os.environ.setdefault(name, value)
    with quiet_mlflow():
        from mlflow import MlflowClient
        from mlflow.tracking.registry import UnsupportedModelRegistryStoreURIException

        try:
            client = MlflowClient(uri)
        except ModuleNotFoundError as error:
            raise StoreError(
                f"tracking store: {uri!r} needs the package {error.name}; install it, or use another store "
                f"{OTHER_STORE}"
            ) from None
        except UnsupportedModelRegistryStoreURIException:
            raise StoreError(
                f"tracking store: {uri!r} is of no kind that MLflow knows; expected a database such as "
                f"sqlite:////absolute/path/mlflow.db or a server's http(s) address {OTHER_STORE}"
            ) from None
    with suppress(OSError):
        note_file(uri)
    return client


def _refuse_file_store(uri: str) -> None:
    is_folder = uri.startswith("file:") or ("://" not in uri and uri not in ("databricks", "uc"))
    allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("1", "true")
    if is_folder and not allowed and not uri.startswith(("databricks", "sqlite")):
        raise StoreError(
            f"tracking store: {uri!r} is a folder, which MLflow 3 does not support; expected a database such as "
            f"sqlite:////absolute/path/mlflow.db or a server's http(s) address; "
            f"change MLFLOW_TRACKING_URI or logger.tracking_uri (or set MLFLOW_ALLOW_FILE_STORE=true)"
        )
