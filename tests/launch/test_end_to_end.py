"""Whole runs through the command line: launcher, worker, MLflow, exit codes."""

import fcntl
import json
import math
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import yaml
from processes import LAUNCH, environment

from stabletrain.launch.result import read_result

TINY = str(LAUNCH / "tiny.yaml")


def test_a_run_writes_its_folder_and_prints_the_next_commands(cli) -> None:
    """Bugs: a file is missing in the run folder; MLflow has another run; a printed command lacks ``--trust``; a file
    beside the recipe is run by the launcher or the worker, or replaces a module under ``--trust``; the record has the
    settings of the launcher; a file that the module does not close is empty, as its module is never collected."""
    for name in ("xxhash", "queue", "yaml", "mlflow"):
        (cli.folder / f"{name}.py").write_text(f"open('RAN-{name}', 'w')")
    (cli.folder / "mine.py").write_text((LAUNCH / "tiny_workload.py").read_text())
    (cli.folder / "tiny.yaml").write_text(Path(TINY).read_text().replace("tiny_workload.", "mine."))
    done = cli(
        "train",
        "./tiny.yaml",
        "--trust",
        "mine",
        "optimizer=adamw",
        "logger=mlflow",
        "plugins/checkpoints=save",
        "model.does=settings",
        "launch.threads=2",
    )
    assert done.returncode == 0, done.stderr
    assert list(cli.folder.glob("RAN*")) == []
    (result,) = cli.results()
    assert result["end"] == "finished"
    assert result["steps"] == 5
    assert result["threads"] == 2
    (folder,) = (cli.folder / "runs" / "tiny").iterdir()
    content = yaml.safe_load((folder / "run.yaml").read_text())
    assert content["run_dir"] == str(folder)
    assert content["optimizer"]["_target_"] == "torch.optim.AdamW"
    assert content["choices"]["optimizer"] == "adamw"
    assert content["trust"] == ["mine"]
    assert any((folder / "checkpoints").iterdir())
    assert (folder / "worker.log").exists()
    assert (folder / "unclosed.txt").read_text() == "what the user has written"
    record = {path.name: path.read_text() for path in (folder / "environment").iterdir()}
    assert record.keys() >= {"environment.json", "code.json", "data.json", "git.json", "requirements.txt"}
    environment, used = json.loads(record["environment.json"]), json.loads((folder / "settings.json").read_text())
    assert used.pop("variables").items() <= environment["variables"].items()
    assert used.items() <= environment["torch"].items()
    assert (used["threads"], environment["variables"]["OMP_NUM_THREADS"]) == (2, "2")
    assert json.loads(record["code.json"])["mine"]["files"].keys() == {"mine.py"}
    (run,) = cli.runs()
    assert run.info.status == "FINISHED"
    assert run.data.tags["data.digest"] == f"first_batch:{json.loads(record['data.json'])['first_batch']}"
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.tags[0].value) == ("TinyData", "training")
    assert content["logger"]["run_id"] == run.info.run_id
    assert {"parameter_groups.txt", "environment"} <= cli.artifacts()
    page = f"/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}?workflowType=machine_learning"
    assert f"MLflow:      stabletrain ui\n             http://127.0.0.1:5000{page}\n" in done.stdout
    assert done.stdout.count("stabletrain train") == 2
    assert "--trust=mine" in done.stdout


def test_a_plugin_that_stops_the_run_exits_with_3(cli) -> None:
    done = cli.tiny(
        "model.does=poison", "plugins/nonfinite=skip", "plugins.nonfinite.max_in_a_row=4", "trainer.max_steps=50",
        "logger=mlflow",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    (result,) = cli.results()
    assert result["end"] == "stopped"
    assert "4" in result["message"]
    # without its events a run in MLflow does not say why it stopped
    assert cli.artifacts() >= {"run.yaml", "events.jsonl", "result.json", "steps.bin"}
    tags = cli.runs()[0].data.tags
    assert tags["stabletrain.outcome"] == "stopped"
    assert tags["mlflow.source.name"].startswith("stabletrain train ")
    assert "**stopped after 0 steps" in tags["mlflow.note.content"]
    assert "| 4 of 4 |" in tags["mlflow.note.content"]


@pytest.mark.parametrize(
    ("signum", "code", "end"),
    [(signal.SIGINT, 130, "interrupted"), pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_the_run_can_be_resumed(cli, signum: signal.Signals, code: int, end: str) -> None:
    process = cli.start(
        "train", str(Path(__file__).parent / "tiny.yaml"), "--trust", "tiny_workload",
        "model.pause=0.05", "model.does=tell", "model.at=1", "trainer.max_steps=2000", "logger=mlflow", "run_dir=first",
    )  # fmt: skip
    ready = cli.folder / "first" / "worker.log"
    deadline = time.monotonic() + 120
    while not (ready.exists() and "tiny step 1" in ready.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signum)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    checkpoint = cli.folder / "first" / "checkpoints" / "interrupted.ckpt"
    assert f"resume={checkpoint}" in out
    assert cli.runs()[0].info.status == "KILLED"
    result = json.loads((cli.folder / "first" / "result.json").read_text())
    steps = result["steps"]
    assert result["end"] == end
    assert steps > 0
    resumed = cli.tiny(f"resume={checkpoint}", f"trainer.max_steps={steps + 3}", "run_dir=second")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((cli.folder / "second" / "result.json").read_text())["steps"] == steps + 3
    first, second = ((cli.folder / name / "steps.bin").read_bytes() for name in ("first", "second"))
    assert len(second) == 17 * (steps + 3)
    assert second[: 17 * steps] == first[: 17 * steps]  # a resumed run has the whole record


def test_a_sweep_is_one_parent_and_a_process_for_each_job(cli) -> None:
    """Bugs: jobs share a process, a folder or a run in MLflow; one failure cancels the other jobs, or the sweep exits
    with 0; an error in the user's code is one line; a run that failed, or was killed, stays RUNNING; the parent has no
    name, chart or table, or a better status than its jobs; the address is that of the parent, which is empty."""
    from mlflow import MlflowClient

    done = cli.tiny(
        "-m", "seed=7", "model.does=raise,sigkill,nothing", "model.at=2", "logger=mlflow", "run_dir=sweep",
        "plugins/nonfinite=skip",
    )  # fmt: skip
    assert done.returncode == 1
    runs = {run.info.run_name: run for run in cli.runs()}
    parent = runs.pop("tiny: model.does=raise,sigkill,nothing")
    statuses = {name: run.info.status for name, run in runs.items()}
    assert statuses == {
        "model.does=raise": "FAILED", "model.does=sigkill": "KILLED", "model.does=nothing": "FINISHED"
    }  # fmt: skip
    assert parent.info.status == "FAILED"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    ends = [read_result(cli.folder / "sweep" / number) for number in "012"]
    assert [each.end for each in ends if each] == ["failed", "killed", "finished"]
    killed = cli.artifacts(runs["model.does=sigkill"])
    assert killed >= {"steps.bin", "result.json"}
    assert 'raise RuntimeError("a bug in the user\'s module")' in done.stderr
    assert "signal 9" in done.stdout
    client = MlflowClient(f"sqlite:///{cli.folder}/mlflow.db")
    assert ends[2] is not None
    (metric,) = parent.data.metrics
    points = {point.step: point.value for point in client.get_metric_history(parent.info.run_id, metric)}
    assert metric == "sweep/stability/loss"
    assert points[2] == ends[2].metrics["stability/loss"]
    assert {step for step, value in points.items() if math.isnan(value)} == {0, 1}
    assert parent.data.tags["stabletrain.sweep.unfinished"] == "0 (failed), 1 (killed)"
    assert "| 2 | model.does=nothing | finished | 5 |" in parent.data.tags["mlflow.note.content"]
    table = Path(client.download_artifacts(parent.info.run_id, "comparison.csv")).read_text()
    assert all(run.info.run_id in table for run in runs.values())
    (address,) = (line for line in done.stdout.splitlines() if "compare-runs?" in line)
    assert address.endswith("workflowType=machine_learning")
    assert all(run.info.run_id in address for run in runs.values())


@pytest.mark.slow
def test_eight_runs_at_once_on_a_fresh_database(cli) -> None:
    """Bug: runs that start together all migrate the new database, or create the experiment, and all but one die."""
    words = ("train", TINY, "--trust", "tiny_workload", "logger=mlflow", "plugins/nonfinite=skip")
    processes = [cli.start(*words) for _ in range(8)]
    try:
        ends = [(process.communicate(timeout=600), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [errors for (_, errors), code in ends if code] == []
    runs = cli.runs()
    assert [run.info.status for run in runs] == ["FINISHED"] * 8
    assert all(run.data.metrics["stability/loss"] for run in runs)
    assert len({run.info.experiment_id for run in runs}) == 1


@pytest.mark.slow
def test_a_users_mistake_before_and_after_the_first_step(cli) -> None:
    """Bug: a traceback for a mistake in the data; the same exit code before and during training."""
    before = cli.tiny("data.broken=true", "run_dir=before")
    assert before.returncode == 2
    assert "error: data.path: /no/such/file is missing" in before.stderr
    after = cli.tiny("model.does=mistake", "model.at=2", "run_dir=after")
    assert after.returncode == 1
    assert "error: data.path: this file ended early" in after.stderr
    assert "Traceback" not in before.stderr + after.stderr


@pytest.mark.slow
def test_several_processes_and_a_signal_in_one_of_them(cli) -> None:
    """Bug: one process stops and the others wait for it; torchrun's own error hides the cause."""
    done = cli.tiny("launch.processes=2", "launch.threads=1", "run_dir=whole")
    assert done.returncode == 0, done.stderr
    cut = cli.tiny("launch.processes=2", "launch.threads=1", "model.does=sigint", "model.at=2", "run_dir=cut")
    assert cut.returncode == 130, cut.stderr
    assert "ChildFailedError" not in cut.stderr
    assert (cli.folder / "cut" / "checkpoints" / "interrupted.ckpt").exists()


def test_dry_run_makes_nothing(cli) -> None:
    """Bugs: a dry run makes a folder or a run in MLflow, or says nothing about memory."""
    done = cli.tiny("dry_run=true", "logger=mlflow", "memory=1GB")
    assert done.returncode == 0
    assert "the config composes" in done.stdout
    assert "It fits into 1 GB: " in done.stdout
    assert list(cli.folder.iterdir()) == []


@pytest.mark.slow
def test_a_module_that_exits_or_deletes_its_folder(cli) -> None:
    """Bugs: sys.exit(0) in the user's module is a finished run; a deleted folder is a traceback, or goes unsaid."""
    left = cli.tiny("model.does=exit", "model.at=2", "run_dir=left", "logger=mlflow")
    assert left.returncode == 1
    assert "error: sys.exit(0) was called in " in left.stderr
    assert cli.runs()[0].info.status == "FAILED"
    gone = cli.tiny("model.does=remove_folder", "model.at=2", "run_dir=gone")
    assert gone.returncode == 0, gone.stderr
    assert "finished after 5 steps" in gone.stdout
    assert gone.stderr.count("has been deleted during the run") == 1
    assert "Traceback" not in left.stderr + gone.stderr


@pytest.mark.slow
def test_a_terminal_that_is_closed(cli) -> None:
    """Bug: SIGHUP, or an error in printing to the closed terminal, ends the run without a checkpoint."""
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "stabletrain", "train", TINY, "--trust", "tiny_workload", "run_dir=run"),
            *("model.pause=0.05", "model.does=tell", "model.at=1", "trainer.max_steps=2000"),
        ],
        cwd=cli.folder, env=environment(LAUNCH), stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(inner)
    seen = b""
    while b"tiny step 1" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)  # the kernel sends SIGHUP
    assert process.wait(timeout=120) == 143
    result = read_result(cli.folder / "run")
    assert result is not None
    assert (result.end, result.checkpoint) == ("terminated", str(cli.folder / "run/checkpoints/interrupted.ckpt"))
    assert "SIGHUP" in result.message
