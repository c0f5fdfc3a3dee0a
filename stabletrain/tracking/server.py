"""MLflow's server on this machine: with one worker, on a free port, and ended with all of its processes."""

from __future__ import annotations

import errno
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from urllib.parse import urlsplit

import psutil

from stabletrain.errors import UserError
from stabletrain.tracking import server_watch
from stabletrain.tracking.addresses import LOCAL_HOST, LOCAL_PORT, local_server
from stabletrain.tracking.store_errors import sqlite_path

_MOST_PORTS = 100
"""Ports that are tried, from the wanted one on."""
_START_TIMEOUT = 120.0
"""Seconds until a server must answer; it takes about 4 on an idle machine."""
_LAST_LINES = 5
_OTHER_SETTINGS = (
    "MLFLOW_ARTIFACTS_ONLY", "MLFLOW_GUNICORN_OPTS", "MLFLOW_STATIC_PREFIX", "MLFLOW_TRACKING_URI",
    "MLFLOW_UVICORN_OPTS",
)  # fmt: skip
"""Settings for other programs and servers, with which this one would have other pages, processes or stores."""


class ServerFailed(Exception):
    """The server ended, or does not answer; the message has the last lines of its output."""


class PortTaken(ServerFailed):
    """Another program has taken the port while the server was starting."""


class LocalServer:
    """A running server.

    Args:
        watch: the process of `stabletrain.tracking.server_watch`.
        host: on which it listens.
        port: of the server.
        output: of the server, an open file.
    """

    def __init__(self, watch: subprocess.Popen[bytes], host: str, port: int, output: int) -> None:
        self.address = local_server(host, port)
        self._watch, self._host, self._port, self._output = watch, host, port, output

    def wait_until_ready(self) -> None:
        """Wait until the server answers.

        Raises:
            PortTaken: if it ended because another program has its port.
            ServerFailed: if it ended for another reason, or does not answer.
        """
        deadline = time.monotonic() + _START_TIMEOUT
        while not (is_healthy(self.address) and self._is_listening()):
            if self._watch.poll() is not None:
                kind = ServerFailed if _is_free(self._host, self._port) else PortTaken
                raise kind(f"MLflow's server ended while it started; {self._last_lines()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"MLflow's server does not answer within {_START_TIMEOUT:g} s; {self._last_lines()}")
            time.sleep(0.1)

    def wait(self) -> None:
        """Wait until the server ends, which it does not by itself.

        Raises:
            ServerFailed: when it has ended.
        """
        self._watch.wait()
        raise ServerFailed(f"MLflow's server ended; {self._last_lines()}")

    def _is_listening(self) -> bool:
        """Whether the answer came from this server: another one may have taken the port first."""
        with suppress(psutil.Error):
            for process in psutil.Process(self._watch.pid).children(recursive=True):
                listed = getattr(process, "net_connections", None) or process.connections  # the name before psutil 6
                for each in listed(kind="tcp"):
                    if each.status == psutil.CONN_LISTEN and each.laddr.port == self._port:
                        return True
        return False

    def _last_lines(self) -> str:
        size = os.fstat(self._output).st_size
        text = os.pread(self._output, 8192, max(0, size - 8192)).decode("utf-8", "replace")
        lines = [line for line in text.splitlines() if line.strip()][-_LAST_LINES:]
        return "\n  ".join(["its last lines:", *lines]) if lines else "it has printed nothing"


@contextmanager
def local_server_for(uri: str, host: str = LOCAL_HOST, port: int = LOCAL_PORT) -> Iterator[LocalServer]:
    """Start MLflow's server for a store, and end all of its processes when the block or this process ends.

    The server and its worker run in a session of their own, without MLflow's executors of jobs (13 processes more).
    At the end they get SIGINT and, after 5 s, SIGKILL, however this process ends.

    Args:
        uri: MLflow tracking URI of a database that `ensure_store` has made ready.
        host: a name or an address of this machine.
        port: of the server, which must be free.
    """
    with tempfile.TemporaryFile() as output:
        watch = subprocess.Popen(
            [sys.executable, "-P", "-m", server_watch.__name__, *_command(uri, host, port)],
            env=_environment(uri, host),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield LocalServer(watch, host, port, output.fileno())
        finally:
            assert watch.stdin is not None
            watch.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                watch.wait(timeout=server_watch.PATIENCE + 2)
            with suppress(ProcessLookupError):  # what is left if the watching process itself was killed
                os.killpg(watch.pid, signal.SIGKILL)


def free_port(host: str, wanted: int) -> int:
    """Return the first free port from the wanted one on.

    Args:
        host: on which a server will listen.
        wanted: 1 to 65535.

    Raises:
        UserError: if there is none, or this machine has no such host.
    """
    for port in range(wanted, min(wanted + _MOST_PORTS, 65536)):
        if _is_free(host, port):
            return port
    raise UserError(f"ui: the {_MOST_PORTS} ports from {wanted} on are in use on {host}; choose another with --port")


def is_healthy(address: str, timeout: float = 5.0) -> bool:
    """Return whether a server answers. It is asked directly, also if the environment names a proxy.

    Args:
        address: of the server.
        timeout: seconds.
    """
    parts = urlsplit(address)
    if parts.hostname is None:
        return False
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    with closing(kind(parts.hostname, parts.port, timeout=timeout)) as connection:
        try:
            connection.request("GET", f"{parts.path.rstrip('/')}/health")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False


def _command(uri: str, host: str, port: int) -> list[str]:
    database = sqlite_path(uri)
    # for artifacts that are sent to this server; those of stabletrain's runs lie there already
    artifacts = [] if database is None else ["--artifacts-destination", str(database.parent / "mlartifacts")]
    place = ["--host", host, "--port", str(port), "--workers", "1", "--uvicorn-opts", "--log-level warning"]
    return [sys.executable, "-P", "-m", "mlflow", "server", *place, *artifacts]


def _environment(uri: str, host: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in _OTHER_SETTINGS}
    if host not in (LOCAL_HOST, "localhost", "::1", "0.0.0.0", "::"):
        # MLflow answers by default under names of this machine and private addresses only
        allowed = (host, f"{host}:*", "localhost", "localhost:*", LOCAL_HOST, f"{LOCAL_HOST}:*")
        inherited.setdefault("MLFLOW_SERVER_ALLOWED_HOSTS", ",".join(allowed))
    return {
        **inherited,
        "MLFLOW_BACKEND_STORE_URI": uri,  # not an argument, which other users could read: it may hold a password
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PYTHONSAFEPATH": "1",
    }


def _is_free(host: str, port: int) -> bool:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(place)
            probe.listen(1)
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            return False
        if isinstance(error, PermissionError):
            raise UserError(f"ui: this user may not use port {port}; choose one above 1023 with --port") from None
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"ui: {host!r} is no address of this machine ({reason}); leave out --host, or give one of its names or "
            "addresses, or 0.0.0.0 for all of them"
        ) from None
    return True
