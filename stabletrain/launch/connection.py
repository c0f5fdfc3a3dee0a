"""The connection between a launcher and its workers: JSON lines over a Unix socket in a private folder.

A worker reads the configs from a file in that folder, checks and builds them, reports, and waits. The launcher answers
with the path of run.yaml, and the worker trains; or it closes the connection, and the worker ends. While the worker
trains, the end of the connection means that the launcher is gone.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from stabletrain.errors import UserError

OPTION = "--launcher"
"""The worker's option, followed by the folder."""

_ORDER = "order.yaml"
_SOCKET = "socket"
_LONGEST_SOCKET_PATH = 100
"""The kernel's limit is 108 bytes."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one worker found before training.

    Args:
        rank: of the worker.
        problems: pairs of a config key and a message.
        failure: the traceback of an error in the user's own code, or in stabletrain; None if there was none.
        plans: of a dry run, for each config: the plan, or None, and why there is none.
        examined: by ``stabletrain doctor``, for each config: the report, as lines and as plain data.
    """

    rank: int = 0
    problems: Sequence[Sequence[str]] = ()
    failure: str | None = None
    plans: Sequence[Sequence[Any]] = ()
    examined: Sequence[Mapping[str, Any]] = ()


class Workers:
    """The launcher's end. Use it in a ``with`` statement: the workers that do not train end with it.

    Args:
        configs: one config to train, or any number of configs to check.
        then: what the workers do after the check, if there is no mistake: train, end, or plan or examine the runs and
            end.
        build: whether they build what the configs name; otherwise they check the signatures only.
        options: of what is done then.
    """

    def __init__(
        self,
        configs: Sequence[Mapping[str, Any]],
        *,
        then: Literal["train", "end", "plan", "examine"],
        build: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        order = {
            "then": then,
            "build": build,
            "configs": [dict(config) for config in configs],
            "options": dict(options or {}),
        }
        try:
            self.folder = _private_folder()
            (self.folder / _ORDER).write_text(
                yaml.safe_dump(order, sort_keys=False, allow_unicode=True), encoding="utf-8"
            )
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(self.folder / _SOCKET))
            self._listener.listen(64)
        except OSError as error:
            raise UserError(
                f"cannot make a temporary folder with a socket ({error.strerror or error}); set TMPDIR to a folder "
                "with write permission and free space, such as /tmp"
            ) from None
        self._connected: list[socket.socket] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def arguments(self) -> tuple[str, str]:
        """What a worker needs on its command line to connect."""
        return OPTION, str(self.folder)

    def gather(self, count: int, waiting: Callable[[], None]) -> list[Report]:
        """Return the reports of all workers; of those that have arrived, as soon as one contains a mistake.

        Args:
            count: number of workers.
            waiting: called several times a second; raises an exception if there is no point in waiting any more.
        """
        reports: list[Report] = []
        received: dict[socket.socket, bytes] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while len(reports) < count and not any(each.problems or each.failure for each in reports):
                ready = selector.select(timeout=0.1)
                if not ready:  # a worker may have ended after its report, which is then read first
                    waiting()
                for key, _ in ready:
                    if key.fileobj is self._listener:
                        worker, _ = self._listener.accept()
                        self._connected.append(worker)
                        selector.register(worker, selectors.EVENT_READ)
                        continue
                    worker = key.fileobj  # type: ignore[assignment]
                    part = _receive(worker)
                    received[worker] = received.get(worker, b"") + part
                    if not part or received[worker].endswith(b"\n"):
                        selector.unregister(worker)
                    if received[worker].endswith(b"\n"):
                        reports.append(Report(**json.loads(received[worker])))
        return reports

    def train(self, run_yaml: Path) -> None:
        """Tell all workers to train. The folder is not needed any more, and is deleted.

        Args:
            run_yaml: path of the run's run.yaml.
        """
        for worker in self._connected:
            try:
                worker.sendall(json.dumps({"run_yaml": str(run_yaml)}).encode() + b"\n")
            except OSError:  # it has died: its exit code says why
                continue
        self._forget_folder()

    def close(self) -> None:
        """End the connections, and so the workers that do not train yet."""
        self._forget_folder()
        for worker in self._connected:
            worker.close()

    def _forget_folder(self) -> None:
        self._listener.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Launcher:
    """A worker's end. If the launcher ends before training begins, so does this process, at once.

    Args:
        folder: of the launcher's `Workers`.

    Raises:
        OSError: if there is no launcher.
    """

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(folder / _SOCKET))
        order = yaml.safe_load((folder / _ORDER).read_text(encoding="utf-8"))
        self.configs: list[dict[str, Any]] = order["configs"]
        self.is_to_train: bool = order["then"] == "train"
        self.is_to_plan: bool = order["then"] == "plan"
        self.is_to_examine: bool = order["then"] == "examine"
        self.options: dict[str, Any] = order["options"]
        self.is_to_build: bool = order["build"]
        self.is_gone = False
        self._folder = folder
        self._run_yaml: Path | None = None
        self._told = threading.Event()
        self.when_gone: Callable[[], None] | None = None
        """Called by another thread if the launcher ends while this process trains; set it before `report`."""
        threading.Thread(target=self._listen, name="launcher", daemon=True).start()

    def report(self, report: Report) -> None:
        """Send what was found.

        Args:
            report: of this worker.
        """
        try:
            self._socket.sendall(json.dumps(asdict(report)).encode() + b"\n")
        except OSError:  # the launcher is gone; the listening thread ends this process
            time.sleep(60)

    def wait(self) -> Path:
        """Wait until the launcher says to train, and return the path of run.yaml."""
        while not self._told.wait(timeout=0.5):  # with a timeout, so that Python calls its signal handlers
            pass
        assert self._run_yaml is not None
        return self._run_yaml

    def _listen(self) -> None:
        received = b""
        while part := _receive(self._socket):
            received += part
            if received.endswith(b"\n"):
                self._run_yaml = Path(json.loads(received)["run_yaml"])
                self._told.set()
        if not self._told.is_set():
            shutil.rmtree(self._folder, ignore_errors=True)
            os._exit(0)  # nothing has been opened or written; torchrun would report any other code
        self.is_gone = True
        if self.when_gone is not None:
            self.when_gone()


def _private_folder() -> Path:
    """Make a folder that only this user can read, with a path that is short enough for a socket."""
    folder = tempfile.mkdtemp(prefix="stabletrain-")
    if len(os.fsencode(folder)) + len(_SOCKET) + 1 > _LONGEST_SOCKET_PATH:
        os.rmdir(folder)
        folder = tempfile.mkdtemp(prefix="stabletrain-", dir="/tmp")
    return Path(folder)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except ConnectionError:
        return b""
