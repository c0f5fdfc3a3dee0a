"""Runs a server and all that it starts in one process group, which ends when standard input ends.

Standard input is a pipe of the process that has started this one: it ends with that process, also with SIGKILL. The
group then gets SIGINT and, after `PATIENCE`, SIGKILL. Only the standard library is imported: this process waits beside
the server.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from types import FrameType

PATIENCE = 5.0
"""Seconds between SIGINT and SIGKILL."""


def main(command: Sequence[str]) -> None:
    """Run a command until it ends, or standard input does; then SIGKILL ends what is left, this process too.

    Args:
        command: program and arguments of the server.
    """
    if os.getpgrp() != os.getpid():
        os.setsid()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _do_nothing)
    # in an empty folder: MLflow's server imports what lies in the current one, such as a file queue.py of the user
    folder = tempfile.mkdtemp(prefix="stabletrain-ui-")
    try:
        server = subprocess.Popen(list(command), stdin=subprocess.DEVNULL, cwd=folder)
        threading.Thread(target=_end_with_standard_input, args=(server,), daemon=True).start()
        server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)


def _end_with_standard_input(server: subprocess.Popen[bytes]) -> None:
    while os.read(0, 4096):
        pass
    os.killpg(0, signal.SIGINT)
    time.sleep(PATIENCE)
    server.kill()


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    """A handler: a signal that this process ignored would be ignored by the server as well."""


if __name__ == "__main__":
    main(sys.argv[1:])
