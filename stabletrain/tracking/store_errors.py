"""What can be wrong with a tracking store, as one message for the user instead of MLflow's traceback."""

from __future__ import annotations

import logging
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stabletrain.errors import UserError

SQLITE_URI = re.compile(r"^(?P<head>sqlite(?:\+\w+)?:///)(?P<path>[^?]*)(?P<query>\?.*)?$")

OTHER_STORE = "(MLFLOW_TRACKING_URI or logger.tracking_uri)"
"""The keys that name the store, for messages."""

_CAUSES = (
    ("locked", "another program has locked it; end that program (or wait for it), or use another store"),
    ("not a database", "its content is damaged; move it away (a new one is created) or restore a backup"),
    ("malformed", "its content is damaged; move it away (a new one is created) or restore a backup"),
    ("readonly", "it cannot be written; grant write permission to the file and its folder, or use another store"),
    ("unable to open", "it cannot be opened; grant write permission to the file and its folder, or use another store"),
    ("disk is full", "the disk is full; free some space, or use another store"),
    ("disk i/o error", "the disk fails to read or write it; check the disk, or use another store"),
    ("out-of-date", "an older MLflow created it; copy it, then run `mlflow db upgrade <uri>`, or use another store"),
    ("no such table", "a table of MLflow is missing; restore a backup, or use another store"),
    ("can't locate revision", "a newer MLflow created it; install that version of MLflow, or use another store"),
)


_NO_ANSWER = ("connection", "max retries", "timed out", "error code 502", "error code 503", "error code 504")
"""The last ones are of a proxy before a server that does not run."""

_REASON = re.compile(r"Connection refused|Name or service not known|timed out|error code \d+|Connection reset")
"""What is worth showing of the error of a connection, which is a paragraph."""

_NO_CAUSE = "(raised as a result of Query-invoked autoflush"
"""With such a line SQLAlchemy begins some errors."""


class StoreError(UserError):
    """The tracking store cannot be used; the message names the store, the cause and what to do."""


class StoreUnreachable(StoreError):
    """The tracking store is a server that does not respond; it may do so later."""


def sqlite_path(uri: str) -> Path | None:
    """Return the absolute path of a sqlite store's file, or None for any other kind of store.

    >>> sqlite_path("sqlite:////data/mlflow.db")
    PosixPath('/data/mlflow.db')
    >>> sqlite_path("http://localhost:5000") is None
    True
    """
    match = SQLITE_URI.match(uri)
    if match is None or match["path"] in ("", ":memory:"):
        return None
    return Path(match["path"]).absolute()


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Replace errors of the store that the user can correct by a `StoreError`; other errors are unchanged.

    Args:
        uri: MLflow tracking URI, named in the message.
    """
    try:
        with no_tracebacks():
            yield
    except StoreError:
        raise
    except Exception as error:
        text = str(error)
        if isinstance(error, sqlite3.Error) or type(error).__module__.startswith(("sqlalchemy", "mlflow", "alembic")):
            for word, advice in _CAUSES:
                if word in text.lower():
                    raise StoreError(_message(uri, error, advice)) from error
            if any(word in text.lower() for word in _NO_ANSWER):
                found = _REASON.search(text)
                reason = f" ({found.group()})" if found else ""
                what = f"tracking store: {uri}: the server does not respond{reason}"
                raise StoreUnreachable(f"{what}; start it or correct the URI {OTHER_STORE}") from error
        raise


@contextmanager
def no_tracebacks() -> Iterator[None]:
    """Drop the tracebacks that MLflow logs in this thread, and the retries of a connection that urllib3 logs.

    Both raise the same errors, which are reported once.
    """
    for name, keep in (("mlflow.store.db.utils", _without_traceback), ("urllib3.connectionpool", _outside)):
        logger = logging.getLogger(name)
        if keep not in logger.filters:
            logger.addFilter(keep)
    before = getattr(_quiet, "depth", 0)
    _quiet.depth = before + 1
    try:
        yield
    finally:
        _quiet.depth = before


_quiet = threading.local()


def _without_traceback(record: logging.LogRecord) -> bool:
    return record.exc_info is None or _outside(record)


def _outside(record: logging.LogRecord) -> bool:
    return getattr(_quiet, "depth", 0) == 0


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something of the cause; the error's class if there is none.

    That of a server that does not respond is shortened.

    Args:
        error: any.
    """
    found = _REASON.search(str(error))
    if found and any(mark in str(error) for mark in ("HTTPConnectionPool", "API request to")):
        return f"the server does not respond ({found.group()})"
    lines = [line for line in str(error).strip().splitlines() if not line.startswith(_NO_CAUSE)]
    return lines[0] if lines else type(error).__name__


def _message(uri: str, error: Exception, advice: str) -> str:
    path = sqlite_path(uri)
    what = f"database {path}" if path is not None else uri
    return f"tracking store: {what}: {first_line(error)}: {advice} {OTHER_STORE}"
