import os
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

from stabletrain.errors import UserError
from stabletrain.tracking import StoreError, default_tracking_uri, ensure_store
from stabletrain.tracking.store_errors import first_line, translate_errors


def test_default_is_an_absolute_path(tmp_path, monkeypatch):
    """Bug: a relative path means another file in every process that has another current folder."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri() == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("http://localhost:5000", "http://localhost:5000"),
        ("sqlite:////x/y.db", "sqlite:////x/y.db"),
        ("sqlite:///y.db?timeout=3", "sqlite:///{cwd}/y.db?timeout=3"),
    ],
)
def test_environment_wins(tmp_path, monkeypatch, value, expected):
    """Bug: the variable is read at import (as Lightning does), or its relative path stays relative."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", value)
    assert default_tracking_uri() == expected.format(cwd=tmp_path)


THREE = """
import multiprocessing, sys
import mlflow  # once, and not in each process
from stabletrain.tracking.runs import create_run, ensure_store

forked = multiprocessing.get_context("fork")
together = forked.Barrier(3)

def start(uri):
    together.wait(60)
    ensure_store(uri)
    return create_run(uri, "race")

with forked.Pool(3) as pool:
    print(*pool.map(start, sys.argv[1:] * 3, chunksize=1))
"""


def test_three_processes_on_a_fresh_database(tmp_path):
    """Bug: processes that start together all migrate, and all but one die."""
    uri = f"sqlite:///{tmp_path}/deep/er/mlflow.db"
    done = subprocess.run(
        [sys.executable, "-c", THREE, uri], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 3
    assert "Creating initial" not in done.stderr


def corrupt_random(path: Path) -> None:
    path.write_bytes(os.urandom(40_000))


def corrupt_truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50_000])


def corrupt_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8192:60_000] = os.urandom(60_000 - 8192)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [corrupt_random, corrupt_truncated, corrupt_middle])
def test_damaged_database(uri, tmp_path, damage):
    """Bug: MLflow retries a damaged file for more than a minute, then shows a page of SQL."""
    damage(tmp_path / "mlflow.db")
    with pytest.raises(StoreError) as caught:
        ensure_store(uri)
    message = str(caught.value)
    assert str(tmp_path / "mlflow.db") in message
    assert "damaged" in message
    assert "restore a backup" in message
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, ValueError)


def test_locked_database(uri, tmp_path):
    """Bug: a database that another program has locked ends in a traceback, or hangs."""
    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match=r"mlflow\.db.*locked.*another program"):
            ensure_store(uri, timeout=0.1)
        other.execute("ROLLBACK")
    ensure_store(uri)


def test_held_lock_file(uri, tmp_path):
    """Bug: a process that hangs while it holds the lock makes every later one hang without a word."""
    from filelock import FileLock

    from stabletrain.tracking.store import store_lock

    with (
        FileLock(tmp_path / "mlflow.db.lock"),
        pytest.raises(StoreError, match=r"another process has locked .*mlflow\.db\.lock for more than"),
        store_lock(uri, timeout=0.1),
    ):
        pass


def test_folder_that_cannot_be_made(tmp_path):
    """Bug: an unwritable folder raises PermissionError or NotADirectoryError without saying what to change."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"MLFLOW_TRACKING_URI"):
        ensure_store(f"sqlite:///{tmp_path}/file/mlflow.db")


def test_path_is_a_folder(tmp_path):
    """Bug: 'unable to open database file' for a folder hides the typing mistake."""
    with pytest.raises(StoreError, match="is a folder"):
        ensure_store(f"sqlite:///{tmp_path}")


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "mlruns"])
def test_file_store(uri, monkeypatch):
    """Bug: MLflow 3 refuses folders only after the run was prepared."""
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(StoreError, match="sqlite:///"):
        ensure_store(uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    ensure_store(uri)


def test_servers_are_not_changed():
    """Bug: a server's address is taken for a path."""
    ensure_store("http://localhost:1")
    ensure_store("databricks")


def revision(path: Path) -> str:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT version_num FROM alembic_version").fetchone()[0]


def test_old_schema_is_upgraded_after_a_copy(uri, tmp_path):
    """Bug: after an update of MLflow the first run dies, or its database is changed without a copy."""
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    path = tmp_path / "mlflow.db"
    latest = revision(path)
    command.downgrade(_get_alembic_config(uri), "-1")
    old = revision(path)
    assert old != latest
    ensure_store(uri)
    assert revision(path) == latest
    (copy,) = tmp_path.glob("mlflow.db.before-upgrade-*")
    assert revision(copy) == old


def test_schema_of_a_newer_mlflow(uri, tmp_path):
    """Bug: a database of a newer MLflow gives a page of alembic."""
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
        connection.commit()
    with pytest.raises(StoreError, match=r"could not be upgraded.*mlflow db upgrade.*before-upgrade"):
        ensure_store(uri)


def test_a_message_begins_with_the_cause():
    """Bug: SQLAlchemy's advice about its own sessions is shown in place of what is wrong with the store."""
    advice = "(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)"
    assert first_line(RuntimeError(f"{advice}\n(sqlite3.OperationalError) no such table: metrics\n[SQL: ]")) == (
        "(sqlite3.OperationalError) no such table: metrics"
    )
    pool = "API request to http://x failed with exception HTTPConnectionPool(...): Max retries (Connection refused)"
    assert first_line(RuntimeError(pool)) == "the server does not respond (Connection refused)"


def test_other_errors_keep_their_type():
    """Bug: a bug of ours is dressed up as a mistake of the user."""
    with pytest.raises(KeyError), translate_errors("sqlite:////x.db"):
        raise KeyError("locked")


def foreign_table(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE notes (text)")
        connection.commit()


def foreign_schema(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        for name in ("experiments", "runs", "metrics", "params", "tags"):
            connection.execute(f"CREATE TABLE {name} (own)")
        connection.execute("CREATE TABLE alembic_version (version_num)")
        connection.execute("INSERT INTO alembic_version VALUES ('abc')")
        connection.commit()


def foreign_alembic(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num)")
        connection.execute("INSERT INTO alembic_version VALUES ('v3.0.0.d')")
        connection.execute("CREATE TABLE studies (study_id)")
        connection.commit()


def foreign_view(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE VIEW runs AS SELECT 1")
        connection.commit()


def text_file(path: Path) -> None:
    path.write_text("these are my notes, and they are longer than the header of a database " * 3)


@pytest.mark.parametrize("make", [foreign_table, foreign_schema, foreign_alembic, foreign_view, text_file])
def test_the_file_of_another_program_is_refused_and_unchanged(tmp_path, make):
    """Bug: MLflow adds its tables to the user's own database, or fails in the middle with a traceback."""
    path = tmp_path / "own.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"own\.db.*logger\.tracking_uri") as caught:
        ensure_store(f"sqlite:///{path}")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["own.db", "own.db.lock"]


def test_a_named_pipe_is_refused(tmp_path):
    """Bug: sqlite waits for ever for somebody who writes into the pipe."""
    os.mkfifo(tmp_path / "mlflow.db")
    with pytest.raises(StoreError, match="no regular file"):
        ensure_store(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.parametrize(
    ("uri", "message"), [("banana://x", "no kind that MLflow knows"), ("postgresql://a/b", "needs the package psycopg")]
)
def test_a_uri_that_mlflow_cannot_open(uri, message):
    """Bug: a typing mistake in the URI, or a missing driver, is a traceback."""
    from stabletrain.tracking.store import open_client

    with pytest.raises(StoreError, match=message):
        open_client(uri)


def deleted(path: Path) -> None:
    path.unlink()


def replaced(path: Path) -> None:
    path.rename(path.with_name("old.db"))
    shutil.copy(path.with_name("old.db"), path)


def folder_removed(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))


@pytest.mark.parametrize("change", [deleted, replaced, folder_removed])
def test_a_store_that_is_taken_away_is_noticed(template, tmp_path, change):
    """Bug: sqlite writes to the deleted file without an error, and everything is lost."""
    from stabletrain.tracking.sqlite_file import check_file
    from stabletrain.tracking.store import open_client

    path = tmp_path / "folder" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(template, path)
    uri = f"sqlite:///{path}"
    open_client(uri)
    check_file(uri)
    change(path)
    with pytest.raises(StoreError, match=r"gone|another file"):
        check_file(uri)
    assert not path.exists() or change is replaced, "the check makes no file"


def test_a_locked_store_is_noticed_quickly(uri, tmp_path):
    """Bug: MLflow waits 20 seconds for a lock, in the training loop."""
    from stabletrain.tracking.sqlite_file import check_file

    with closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        started = time.monotonic()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            check_file(uri, timeout=0.1)
        assert time.monotonic() - started < 2


def test_mlflows_tracebacks_are_dropped_for_our_calls_only(uri, client, tmp_path, caplog, monkeypatch):
    """Bug: each failing write is a traceback of 100 lines on the terminal; or other threads lose theirs."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.orm import Session

    from stabletrain.tracking.store_errors import no_tracebacks

    def full(*_, **__):
        raise OperationalError("insert", {}, sqlite3.OperationalError("database or disk is full"))

    run = client.create_run("0").info.run_id
    monkeypatch.setattr(Session, "execute", full)
    for context in (no_tracebacks, nullcontext):
        caplog.clear()
        with context(), pytest.raises(MlflowException, match="disk is full"):
            client.log_metric(run, "a", 1.0)
        assert ("Traceback" in caplog.text) == (context is nullcontext)
