"""The start of a run, and the end of its launcher, with real processes."""

import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TINY = str(Path(__file__).parent / "tiny.yaml")


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str] | None" = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_mistake_that_the_worker_finds_opens_nothing(cli) -> None:
    """Bugs: a folder, or a run in MLflow, for a config that cannot be built; a message without the key."""
    done = cli.tiny("trainer.profiler=banana", "logger=mlflow", "run_dir=r")
    assert done.returncode == 2
    assert "error: trainer.profiler" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (cli.folder / "r").exists()
    assert cli.runs() == []


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_one_message(cli) -> None:
    """Bugs: torchrun's report of failed processes, or one message for each of them; processes that stay."""
    done = cli.tiny("trainer.profiler=banana", "launch.processes=2", "run_dir=r")
    assert done.returncode == 2
    assert done.stderr.count("trainer.profiler") == 1
    assert "Traceback" not in done.stderr
    assert "ChildFailedError" not in done.stderr
    assert not (cli.folder / "r").exists()


@pytest.mark.slow
def test_the_mistakes_of_all_jobs_are_found_before_the_first_one_trains(cli) -> None:
    """Bug: the twentieth job of a sweep ends with a mistake that was there at the beginning."""
    done = cli.tiny("-m", "trainer.max_time=00:00:09:00,soon", "trainer.profiler=simple,banana", "run_dir=r")
    assert done.returncode == 2
    assert "error: 2 mistakes" in done.stderr
    assert not (cli.folder / "r").exists()


def test_nothing_is_imported_from_the_current_folder(cli) -> None:
    """Bug: a file beside the recipe is run by `validate`; `train`, with ``--trust``: test_end_to_end.py."""
    for name in ("xxhash", "queue", "yaml", "mlflow"):
        (cli.folder / f"{name}.py").write_text(f"open('RAN-{name}', 'w')")
    (cli.folder / "mine.py").write_text("open('RAN-mine', 'w')")
    (cli.folder / "own.yaml").write_text(Path(TINY).read_text().replace("tiny_workload.", "mine."))
    assert "add --trust mine" in cli("validate", "./own.yaml").stderr
    assert list(cli.folder.glob("RAN*")) == []


@pytest.mark.parametrize(
    ("signum", "code", "moment"),
    [
        (signal.SIGINT, 130, "imports"),
        pytest.param(signal.SIGTERM, 143, "imports", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, "opened", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, "opened", marks=pytest.mark.slow),
    ],
)
def test_a_signal_before_training_leaves_nothing(cli, signum: signal.Signals, code: int, moment: str) -> None:
    """Bugs: "ended by signal 11", a traceback, a run that stays open, or an empty run folder, after an early Ctrl-C."""
    # where the launcher and the worker meet; the path of a socket must be short, and pytest's folders have long names
    private = Path(tempfile.mkdtemp(prefix="start"))
    words = ("train", TINY, "--trust", "tiny_workload", "logger=mlflow", "run_dir=r", "trainer.max_steps=-1")
    process = cli.start(*words, "model.pause=0.01", TMPDIR=str(private))
    if moment == "imports":
        wait_until(lambda: any(private.glob("*/socket")), process)
    else:
        wait_until((cli.folder / "r").exists, process)
    process.send_signal(signum)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert signum.name in err
    assert list(private.glob("stabletrain-*")) == []
    shutil.rmtree(private)
    assert {run.info.status for run in cli.runs()} <= {"KILLED"}
    result = cli.folder / "r" / "result.json"
    assert result.exists() or not (cli.folder / "r").exists()  # it may have begun to train


@pytest.mark.parametrize("detach", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_worker_notices_that_its_launcher_was_killed(cli, detach: bool) -> None:
    """Bugs: an orphan trains on unnoticed, or dies without a checkpoint; MLflow shows RUNNING for ever."""
    process = cli.start(
        "train", TINY, "--trust", "tiny_workload", "logger=mlflow", "run_dir=r", "model.does=tell", "model.at=1",
        "model.pause=0.02", f"trainer.max_steps={150 if detach else 5000}", f"launch.detach={str(detach).lower()}",
    )  # fmt: skip
    folder = cli.folder / "r"
    wait_until(lambda: (folder / "worker.log").exists() and "tiny step" in (folder / "worker.log").read_text(), process)
    process.kill()
    process.communicate(timeout=10)
    killed_at = time.monotonic()
    wait_until((folder / "result.json").exists)
    assert detach or time.monotonic() - killed_at < 10
    result = json.loads((folder / "result.json").read_text())
    assert result["end"] == ("finished" if detach else "terminated")
    assert detach or "the launcher is gone" in result["message"]
    assert Path(result["checkpoint"]).exists()
    wait_until(lambda: cli.runs()[0].info.status == ("FINISHED" if detach else "KILLED"))


@pytest.mark.slow
def test_a_worker_that_dies_before_training_is_one_message(cli) -> None:
    """Bugs: the launcher waits for ever for a worker that is dead; a run is opened for it."""
    (cli.folder / "dies.py").write_text("import os\nos._exit(7)\n")
    done = cli("train", TINY, "model._target_=dies.Model", "--trust", "dies", "run_dir=r")
    assert done.returncode == 1
    assert "exit code 7" in done.stderr
    assert not (cli.folder / "r").exists()
