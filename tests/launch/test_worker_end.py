"""The end of a worker: shown once, handed over although a disk is full, never hidden by another failure."""

import errno
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stabletrain.chaos.disk import NoSpace
from stabletrain.errors import UserError
from stabletrain.launch.final_status import final_result
from stabletrain.launch.logs import LogFile
from stabletrain.launch.process import ProcessEnd
from stabletrain.launch.rank_ends import SPARE_ENV, RankEnd, read_ends, write_end
from stabletrain.launch.result import Result, read_result
from stabletrain.launch.streams import Tolerant
from stabletrain.launch.worker_end import WorkerEnd, numbers_of
from stabletrain.runtime.signal_watch import Interrupted, SignalWatch

GLOO = "gloo/transport/tcp/pair.cc:553] Connection closed by peer"


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(
        "stabletrain.launch.worker_end._leave_within", lambda seconds, code: threading.Timer(seconds, lambda: None)
    )


def ending(folder: Path, rank: int, monkeypatch: pytest.MonkeyPatch) -> WorkerEnd:
    monkeypatch.setenv("RANK", str(rank))
    return WorkerEnd(folder, SignalWatch())


def test_the_same_bug_on_all_ranks_is_shown_once(
    several: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bugs: N tracebacks of one bug; a rank that lost its peer shows its own."""
    ends = [ending(tmp_path, rank, monkeypatch) for rank in range(3)]
    for end, error in zip(ends, (RuntimeError(GLOO), ValueError("a bug"), ValueError("a bug")), strict=True):
        end.show(error, started=True)
    on_terminal = [record.getMessage() for record in caplog.records if record.name == "stabletrain"]
    assert on_terminal == ["ValueError: a bug"]
    assert sum(record.name == "worker" for record in caplog.records) == 2


def test_the_first_exception_counts(several: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: an exception while tearing down replaces the cause; the cause is on the disk only after that."""
    end = ending(tmp_path, 1, monkeypatch)
    end.note(UserError("data.path: missing"), started=True)
    assert read_ends(tmp_path)[0].result.message == "data.path: missing"
    result = end.show(RuntimeError("teardown"), started=True)
    end.hand_over(result, None)
    assert read_ends(tmp_path)[0].result.message == "data.path: missing"


def test_a_rank_that_hangs_while_it_tears_down_leaves(tmp_path: Path) -> None:
    """Bug: a failed rank waits for ever for the others in its own teardown, and they for its end."""
    code = (
        "import sys, time; from pathlib import Path; from stabletrain.launch import worker_end as w\n"
        "w._LEAVE_WITHIN = 0.2; end = w.WorkerEnd(Path(sys.argv[1]), w.SignalWatch())\n"
        "end.note(RuntimeError('a bug'), started=True); time.sleep(30)"
    )
    env = {**os.environ, "WORLD_SIZE": "2", "RANK": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, timeout=20, check=False)
    assert done.returncode == 1
    assert read_ends(tmp_path)[0].result.message == "RuntimeError: a bug"


def test_a_sigterm_after_another_rank_has_failed_is_a_consequence(
    several: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: torchrun's SIGTERM waits for a batch that never ends, and then counts as the user's."""
    end = ending(tmp_path, 0, monkeypatch)
    watch = end._watch
    assert not watch.must_not_wait()
    write_end(RankEnd(rank=1, result=Result(end="failed")), tmp_path)
    assert watch.must_not_wait()
    end.hand_over(end.show(Interrupted(15), started=True), None)
    assert read_ends(tmp_path)[0].consequence


def trainer(**metrics: Any) -> Any:
    return SimpleNamespace(global_step=7, is_global_zero=True, callback_metrics=metrics)


@pytest.mark.parametrize("free", [*range(0, 400, 25), 10**6])
def test_a_full_disk_at_any_byte_changes_no_end(
    free: int, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: two tracebacks, exit code 1 and no result although all steps were done."""
    run, spare = Path(config["run_dir"]), tmp_path / "spare"
    run.mkdir()
    spare.mkdir()
    monkeypatch.setenv(SPARE_ENV, str(spare))
    undo = NoSpace(run, free).install()
    try:
        end = WorkerEnd(run, SignalWatch())
        result = end.hand_over(Result(end="finished", message="done"), trainer(loss=torch.tensor(2.0)))
        assert result.exit_code == 0
        joined = final_result(config, ProcessEnd(code=0), spare)
    finally:
        undo()
    assert (joined.end, joined.steps, joined.metrics) == ("finished", 7, {"loss": 2.0})
    left = read_result(run)
    assert left is None or left == joined
    assert not [*run.glob(".*"), *(run / "ends").glob(".*")]


def test_without_a_launcher_the_end_is_said_aloud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a worker on its own whose folder was removed ends without a word."""
    monkeypatch.delenv(SPARE_ENV, raising=False)
    end = WorkerEnd(tmp_path / "removed", SignalWatch())
    assert end.hand_over(Result(end="finished", message="done"), trainer()).exit_code == 0
    assert "result.json cannot be written" in caplog.text
    assert "the run has ended after 7 steps: finished: done" in caplog.text
    assert not (tmp_path / "removed").exists()


class Half:
    """A Trainer that is built in part."""

    is_global_zero = True

    @property
    def global_step(self) -> int:
        raise AttributeError("fit_loop")


def test_half_a_trainer_and_odd_metrics(tmp_path: Path) -> None:
    """Bug: the real end is hidden by an error about a metric or an attribute."""

    class Odd:
        def __float__(self) -> float:
            raise RuntimeError("no")

    metrics = {"a": torch.ones(2), "b": "text", "c": None, "d": Odd(), "loss": torch.tensor(3.0), "n": float("nan")}
    assert list(numbers_of(metrics)) == ["loss", "n"]
    half: Any = Half()
    assert WorkerEnd(tmp_path, SignalWatch()).hand_over(Result(end="failed"), half).end == "failed"
    found = read_result(tmp_path)
    assert found is not None
    assert found.end == "failed"


class BrokenStream:
    """A closed terminal."""

    encoding = "ascii"

    def __init__(self, error: Exception | None) -> None:
        self.error, self.text = error, ""

    def write(self, text: str) -> int:
        if self.error:
            raise self.error
        text.encode(self.encoding)
        self.text += text
        return len(text)

    def flush(self) -> None:
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.EIO, "x"), OSError(errno.ENOSPC, "x"), ValueError("closed")],
)
def test_output_that_breaks_does_not_end_a_run(error: Exception) -> None:
    """Bug: closing the terminal or the reader of a pipe ends the training with a traceback."""
    stream = Tolerant(BrokenStream(error))
    for _ in range(2):
        print("text", file=stream, flush=True)


def test_characters_that_a_terminal_does_not_have_are_escaped() -> None:
    """Bug: a UnicodeEncodeError from a user's metric name ends the run."""
    inner = BrokenStream(None)
    print("ü \udc80", file=Tolerant(inner))
    assert inner.text == "\\xfc \\udc80\n"


def test_a_full_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a traceback for every record."""
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    handler = LogFile(Path("/dev/full"))
    for _ in range(5):
        handler.emit(logging.makeLogRecord({"msg": "x" * 100_000}))
    handler.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "/dev/full cannot be written" in lines[0]
    assert sys.stderr is not None
