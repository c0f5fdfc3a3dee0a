"""Signals from the launcher to its worker, with small processes instead of trainings."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stabletrain.launch import process
from stabletrain.launch.final_status import final_result
from stabletrain.launch.process import ProcessEnd, start_process, wait_for
from stabletrain.launch.process_tree import children, descendants, kill_tree

STUBBORN = """
import signal, sys, time
from pathlib import Path
log = Path(sys.argv[1])
def note(signum, frame):
    with log.open("a") as file:
        print(signal.Signals(signum).name, file=file)
    if len(log.read_text().split()) > int(sys.argv[2]):
        sys.exit(5)
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, note)
log.write_text("ready\\n")
time.sleep(60)
while True:
    time.sleep(1)
"""


@pytest.fixture
def press(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Press]":
    monkeypatch.setattr(process, "SAME_PRESS", 0.15)
    # a signal that arrives when the worker has ended must not end the tests
    before = {signum: signal.signal(signum, lambda *_: None) for signum in (INT, TERM, HUP)}
    yield Press(tmp_path / "log")
    for signum, handler in before.items():
        signal.signal(signum, handler)


class Press:
    """Runs a worker that notes its signals and ends at one of them, while signals arrive in this process."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, signums: list[signal.Signals], ends_at: int = 9, pause: float = 0.25) -> ProcessEnd:
        def send() -> None:
            while not (self.log.exists() and "ready" in self.log.read_text()):
                time.sleep(0.02)
            for signum in signums:
                os.kill(os.getpid(), signum)
                time.sleep(pause)

        thread = threading.Thread(target=send)
        thread.start()
        command = [sys.executable, "-c", STUBBORN, str(self.log), str(ends_at)]
        try:
            return wait_for(start_process(command, dict(os.environ)), lambda: None)
        finally:
            thread.join()

    @property
    def received(self) -> list[str]:
        return self.log.read_text().split()[1:]


INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL


@pytest.mark.parametrize(
    ("signums", "ends_at", "received", "end", "message"),
    [
        ([INT], 1, ["SIGINT"], "interrupted", "ended by SIGINT, before it wrote a result"),
        ([INT, INT], 2, ["SIGINT", "SIGINT"], "interrupted", "ended by SIGINT, before it wrote a result"),
        ([INT, TERM], 2, ["SIGINT", "SIGINT"], "interrupted", "ended by SIGINT"),
        ([TERM, INT], 2, ["SIGTERM", "SIGTERM"], "terminated", "ended by SIGTERM"),
        ([HUP], 1, ["SIGHUP"], "terminated", "ended by SIGHUP"),
        ([INT, INT, INT], 9, ["SIGINT", "SIGINT"], "interrupted", "SIGINT; the processes were killed"),
    ],
)
def test_the_first_signal_decides_how_the_run_ends(
    signums: list[signal.Signals],
    ends_at: int,
    received: list[str],
    end: str,
    message: str,
    press: Press,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Bugs: Ctrl-C twice is "terminated", four times "out of memory"; nobody says what the next press does."""
    ended = press(signums, ends_at)
    assert press.received == received
    (tmp_path / "run").mkdir()
    config = {"run_dir": str(tmp_path / "run"), "launch": {"kind": "local", "processes": 1, "nodes": 1}}
    result = final_result(config, ended)
    assert result.end == end
    assert message in result.message
    said = capfd.readouterr().err
    assert f"{signums[0].name}: stopping after this batch, with a checkpoint; " in said
    assert "again to stop without one" in said
    assert ("stopping now, without a checkpoint" in said) == (len(signums) > 1)


def test_one_press_that_arrives_twice_counts_once(press: Press) -> None:
    """Bug: a terminal or a wrapper that sends Ctrl-C to a group and to its process loses the checkpoint."""
    ended = press([INT, INT, TERM], ends_at=1, pause=0.01)
    assert press.received == ["SIGINT"]
    assert (ended.code, ended.signum, ended.killed) == (5, INT, False)


def test_a_worker_killed_from_outside_was_not_interrupted(tmp_path: Path) -> None:
    """Bug: the end by the kernel's memory killer looks like the user's."""
    process = start_process([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], dict(os.environ))
    ended = wait_for(process, lambda: None)
    assert ended == ProcessEnd(code=-KILL)


def test_all_processes_of_a_run_are_killed(tmp_path: Path) -> None:
    """Bug: torchrun's workers have sessions of their own, and train on when torchrun is killed."""
    inner = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], "
    inner += "start_new_session=True); print('x', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", inner], start_new_session=True, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        found = descendants(parent.pid)
        assert found == children(parent.pid)
        assert parent.pid in children(os.getpid())
        kill_tree(parent.pid)
        assert parent.wait(10) == -KILL
    (child,) = found
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("still running")
