"""The connection between launcher and workers, in one process where that is possible."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from stabletrain.launch.connection import Report, Workers

WORKER = """
import sys, time
from pathlib import Path
from stabletrain.launch.connection import Launcher, Report
launcher = Launcher(Path(sys.argv[1]))
"""
REPORTS = "launcher.report(Report(rank=1, problems=[('a.b', 'ä wrong')], failure=None))"


def start(workers: Workers, *lines: str) -> "subprocess.Popen[bytes]":
    script = WORKER + textwrap.dedent("\n".join(lines))
    return subprocess.Popen([sys.executable, "-c", script, str(workers.folder)], stdout=subprocess.PIPE)


def no_point_in_waiting() -> None:
    raise TimeoutError


def test_the_report_of_a_worker_that_has_ended_already_is_read() -> None:
    """Bug: the launcher, which was busy with the tracking store, sees a dead worker and not what it reported."""
    with Workers([{"seed": 1}], then="end") as workers:
        process = start(workers, REPORTS)
        process.communicate(timeout=60)
        assert process.returncode == 0
        (report,) = workers.gather(1, no_point_in_waiting)
    assert report == Report(rank=1, problems=[["a.b", "ä wrong"]], plans=[], examined=[])
    assert not workers.folder.exists()


def test_the_worker_gets_the_configs_and_the_path() -> None:
    """Bug: a value of another type on the way, or a path cut at the end of a packet."""
    path = Path("/" + "a b/" * 500 + "run.yaml")
    config = {"lr": 1e-3, "text": "1e-3", "n": float("inf"), "nested": {"a": [None, True]}}
    with Workers([config], then="train") as workers:
        process = start(
            workers,
            "launcher.report(Report())",
            f"assert launcher.configs == [{config!r}]".replace("inf", "float('inf')"),
            "print(launcher.wait(), launcher.is_to_train)",
        )
        assert workers.gather(1, lambda: None) == [Report(problems=[], plans=[], examined=[])]
        workers.train(path)
        out, _ = process.communicate(timeout=60)
        assert out.decode().strip() == f"{path} True"


@pytest.mark.parametrize("told", [False, True])
def test_a_worker_notices_the_end_of_the_launcher(told: bool, tmp_path: Path) -> None:
    """Bugs: a worker that nobody waits for stays; one that trains is ended at once, without a checkpoint."""
    workers = Workers([{}], then="train")
    process = start(
        workers,
        "launcher.when_gone = lambda: print('gone', flush=True)",
        "launcher.report(Report())",
        "launcher.wait()",
        "time.sleep(1)",
        "print('saved')",
    )
    workers.gather(1, lambda: None)
    if told:
        workers.train(tmp_path)
    workers.close()
    out, _ = process.communicate(timeout=60)
    assert out.decode().split() == (["gone", "saved"] if told else [])
    assert process.returncode == 0


def test_a_long_path_of_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a socket's path has at most 108 bytes, and a TMPDIR of a batch system may be longer."""
    long = tmp_path / ("x" * 120)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    with Workers([], then="end") as workers:
        assert workers.folder.stat().st_mode & 0o777 == 0o700
        assert workers.folder.stat().st_uid == os.getuid()
    assert not workers.folder.exists()
