"""MLflow's server for a store: ready, on its own port, and gone with all of its processes, however that comes."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest
from processes import environment

from stabletrain.errors import UserError
from stabletrain.tracking import server, server_watch

SERVER = """
import signal, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"],
    stdout=subprocess.PIPE)
other.stdout.readline()
if sys.argv[2] == "ends": sys.exit(3)
if sys.argv[2] == "ignores": signal.signal(signal.SIGINT, signal.SIG_IGN)
open(sys.argv[1], "w").close()
time.sleep(600)
"""
"""A server with a worker that ignores SIGINT."""


def session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("does", ["waits", "ends", pytest.param("ignores", marks=pytest.mark.slow)])
def test_nothing_of_a_server_is_left(tmp_path: Path, does: str) -> None:
    """Bugs: a server's workers stay when it ends; a server that ignores SIGINT stays; with one killed parent all stay;
    SIGINT has no effect on the server because the shell ignored it for a job in the background."""
    ready = tmp_path / "ready"
    command = [sys.executable, "-P", "-m", server_watch.__name__, sys.executable, "-c", SERVER, str(ready), does]
    # the parent of the watching process, which is killed
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "watch = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(watch.pid, flush=True); time.sleep(600)"
    )
    variables = environment(TMPDIR=str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, env=variables)
    with parent:
        assert parent.stdout is not None
        leader = int(parent.stdout.readline())
        if does != "ends":
            wait_for(ready.exists)
            assert len(session(leader)) == 3
            parent.kill()
        wait_for(lambda: not session(leader))
        parent.kill()
    assert not list(tmp_path.glob("stabletrain-ui-*"))


def test_the_next_free_port() -> None:
    """Bugs: a port in use is a traceback of the server; a host of another machine is taken for a port in use."""
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        used = other.getsockname()[1]
        assert not server.is_healthy(f"http://127.0.0.1:{used}", timeout=0.1)
        assert used < server.free_port("127.0.0.1", used) < used + 100
        assert server.free_port("0.0.0.0", used) > used
    assert server.free_port("127.0.0.1", used) == used
    assert not server.is_healthy(f"http://127.0.0.1:{used}")
    for host in ("192.0.2.1", "no.such.host.invalid", "a" * 70, "\0"):
        with pytest.raises(UserError, match=r"no address of this machine.*--host"):
            server.free_port(host, used)


def test_a_server_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: waiting for a server that has ended; its message is lost; another server's answer is taken for its own."""
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(server, "is_healthy", lambda address: True)  # the other one answers
        monkeypatch.setattr(server, "_command", lambda *_: [sys.executable, "-c", "print('no such table')"])
        with (
            server.local_server_for("sqlite:///x.db", "127.0.0.1", port) as running,
            pytest.raises(server.PortTaken, match="no such table"),
        ):
            running.wait_until_ready()
    with server.local_server_for("sqlite:///x.db", "127.0.0.1", port) as running:
        with pytest.raises(server.ServerFailed, match="no such table") as caught:
            running.wait_until_ready()
        assert not isinstance(caught.value, server.PortTaken)
        with pytest.raises(server.ServerFailed, match="no such table"):
            running.wait()


def test_settings_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a password on a command line that all users can read; settings for another server move the pages."""
    monkeypatch.setenv("MLFLOW_STATIC_PREFIX", "/x")
    monkeypatch.delenv("MLFLOW_SERVER_ALLOWED_HOSTS", raising=False)
    uri = "postgresql://me:secret@host/db"
    assert not [word for word in server._command(uri, "127.0.0.1", 1) if "secret" in word]
    variables = server._environment(uri, "127.0.0.1")
    assert variables["MLFLOW_BACKEND_STORE_URI"] == uri
    assert not {"MLFLOW_STATIC_PREFIX", "MLFLOW_SERVER_ALLOWED_HOSTS"} & set(variables)
    assert "box.lan:*" in server._environment(uri, "box.lan")["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert "--artifacts-destination" in server._command("sqlite:////a/b.db", "127.0.0.1", 1)


def start_ui(folder: Path, *words: str) -> tuple["subprocess.Popen[str]", list[str], int]:
    """The process, its lines, and the id of the server's session, once it has said that the server answers."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "stabletrain", "ui", *words], cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=environment(TMPDIR=str(folder), MLFLOW_DISABLE_TELEMETRY="true"),
    )  # fmt: skip
    lines: list[str] = []
    assert process.stdout is not None
    while not lines or not lines[-1].startswith("Ctrl-C"):
        line = process.stdout.readline()
        assert line, lines
        lines.append(line.strip())
    (watch,) = psutil.Process(process.pid).children()
    return process, lines, watch.pid


@pytest.mark.slow
def test_ui_from_start_to_end(uri: str, client, tmp_path: Path) -> None:
    """Bugs: an address that does not answer, or opens MLflow's other side; a module in the current folder is run; a
    used port ends it; artifacts cannot be read; processes are left after Ctrl-C or SIGKILL of ours."""
    from stabletrain.tracking.runs import create_run

    for name in ("queue", "mlflow", "uvicorn", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open('{tmp_path}/RAN-{name}', 'w')")
    parent = create_run(uri, "a b", name="char_gpt: seed=0,1", tags={"stabletrain.sweep": "true"})
    jobs = [create_run(uri, "a b", tags={"mlflow.parentRunId": parent}) for _ in range(2)]
    (tmp_path / "note.txt").write_text("a note")
    client.log_artifact(jobs[0], str(tmp_path / "note.txt"))
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        used = other.getsockname()[1]
        for signum, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
            process, lines, leader = start_ui(tmp_path, "--port", str(used))
            with process:
                home = next(line for line in lines if line.startswith("http"))
                address = home.partition("/#/")[0]
                assert f"port {used} is in use; the next free one is {address.rpartition(':')[2]}" in lines
                assert server.is_healthy(address)
                assert all("workflowType=machine_learning" in line for line in lines if "http:" in line)
                table, sweep = (line for line in lines if line.startswith("latest"))
                assert "compareRunsMode=TABLE" in table
                assert "compare-runs?" in sweep
                assert all(job in sweep for job in jobs)
                assert len(session(leader)) == 3
                if signum == signal.SIGINT:
                    with urlopen(f"{address}/get-artifact?path=note.txt&run_uuid={jobs[0]}") as page:
                        assert page.read() == b"a note"
                process.send_signal(signum)
                assert process.wait(timeout=30) == code
            wait_for(lambda leader=leader: not session(leader))  # type: ignore[misc]
    assert not list(tmp_path.glob("RAN-*"))
    assert not list(tmp_path.glob("stabletrain-ui-*"))
