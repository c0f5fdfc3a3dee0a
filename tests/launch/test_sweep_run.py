"""The run above a sweep's jobs: its name, chart, table, and status."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from stabletrain.launch.result import End, Result
from stabletrain.launch.sweep_run import SweepRun
from stabletrain.launch.sweep_text import SweepJob, objective_of, sweep_name


@pytest.fixture
def uri(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copy(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def job(number: int, end: End | None, run_id: str | None = None, **metrics: float) -> SweepJob:
    named = {name.replace("_", "/"): value for name, value in metrics.items()}
    result = None if end is None else Result(end=end, steps=5, metrics=named)
    return SweepJob(number=number, recipe="gpt", name=f"seed={number}", run_id=run_id, result=result)


def test_the_name_says_what_varies() -> None:
    """Bugs: every sweep is called "sweep"; what is equal in all jobs is part of the name; a thousand values are."""
    words = [["+chaos=a", f"seed={seed}", "plugins/clip=none"] for seed in range(100)]
    assert sweep_name(["gpt"] * 100, words) == "gpt: seed=0,1,2,3,4,5,...,99 (100 values)"
    assert sweep_name(["a", "a", "b", "b"], [["x.y='1,2'"], ["x.y=3"]] * 2) == "a,b: x.y='1,2',3"
    assert sweep_name(["gpt"], [["seed=1"]]) == "gpt"


def test_the_objective() -> None:
    """Bugs: the loss in training is compared although there is one of validation; a metric named in the config is
    replaced by another one."""
    assert objective_of({"val/accuracy": 1.0, "stability/loss": 1.0, "train/loss": 1.0}) == "train/loss"
    assert objective_of({"loss": 1.0, "val_nll_loss": 1.0}) == "val_nll_loss"
    assert objective_of({"val_loss": 1.0}, "val/loss") == "val/loss"
    assert objective_of({"val/loss": 1.0}, "val/los") is None


@pytest.mark.parametrize(
    ("ends", "status"),
    [
        (["finished", "killed", "failed"], "FAILED"),
        (["failed", "finished", "killed"], "FAILED"),
        (["finished", "killed"], "KILLED"),
        (["finished", "stopped"], "FAILED"),
        (["finished", "finished"], "FINISHED"),
        ([None], "FINISHED"),
    ],
)
def test_the_worst_status(uri: str, ends: list[End | None], status: str) -> None:
    """Bug: a sweep with a failed job is KILLED, since another one was killed."""
    from mlflow import MlflowClient

    sweep = SweepRun(["stabletrain", "train"], "gpt", len(ends))
    run_id = sweep.open(uri, "demo")
    assert MlflowClient(uri).get_run(run_id).info.status == "RUNNING"
    for number, end in enumerate(ends):
        sweep.add(job(number, end))
    sweep.finish()
    assert MlflowClient(uri).get_run(run_id).info.status == status


def test_one_chart_and_one_table(uri: str) -> None:
    """Bugs: a job that failed has its last value as if it had finished, or no mark; a job that failed first has no
    point; infinity is stored as 1.8e308; a job without the metric ends the sweep, or begins a second chart."""
    from mlflow import MlflowClient

    from stabletrain.tracking.runs import create_run

    client = MlflowClient(uri)
    sweep = SweepRun(
        ["stabletrain", "train", "gpt", "-m", "seed=0,1,2,3,4,5,6"],
        sweep_name(["gpt"] * 7, [[f"seed={i}"] for i in range(7)]),
        7,
    )
    parent = sweep.open(uri, "demo")
    assert sweep.open(uri, "demo") == parent
    ids = [create_run(uri, "demo", name=f"run {i}") for i in range(2)]
    for each in (
        job(0, "stopped", ids[0], val_loss=9.0),
        job(1, "finished", ids[1], val_loss=2.0, train_loss=1.0),
        job(2, "finished", train_loss=1.0),
        job(3, "finished", val_loss=math.inf),
        job(4, None),
        job(5, "finished", val_loss=math.nan),
    ):
        sweep.add(each)
    sweep.finish()
    run = client.get_run(parent)
    assert set(run.data.metrics) == {"sweep/val/loss"}
    points = {point.step: point.value for point in client.get_metric_history(parent, "sweep/val/loss")}
    assert points.pop(1) == 2.0
    assert all(map(math.isnan, points.values()))
    assert set(points) == {0, 2, 3, 5}
    text = run.data.tags["mlflow.note.content"]
    for row in (
        "| 0 | seed=0 | stopped | 5 | - |",
        "| 1 | seed=1 | finished | 5 | 2 |",
        "| 3 | seed=3 | finished | 5 | inf |",
    ):
        assert row in text
    assert "| 4 | seed=4 | submitted | 0 | - |" in text
    assert "1 runs were not started" in text
    assert run.data.tags["stabletrain.sweep.unfinished"] == "0 (stopped)"
    assert "seed=0,1,2" in run.data.tags["mlflow.source.name"]
    page = Path(client.download_artifacts(parent, "comparison.html")).read_text()
    assert all(f"run {i}" in page for i in range(2))
    table = Path(client.download_artifacts(parent, "comparison.csv")).read_text()
    assert all(each in table for each in ids)


def test_a_store_that_fails_ends_no_sweep(uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: jobs that have trained are lost to the user, since the run above them cannot be written."""
    sweep = SweepRun(["stabletrain"], "gpt", 1)
    sweep.finish()
    sweep.open(uri, "demo")
    (tmp_path / "mlflow.db").unlink()
    sweep.add(job(0, "finished", val_loss=1.0))
    sweep.finish()
    assert "lacks a point" in caplog.text
    assert "lacks a final status" in caplog.text


def test_a_metric_that_does_not_exist_is_said(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a mistyped objective is an empty chart without a word."""
    sweep = SweepRun(["stabletrain"], "gpt", 1)
    sweep.open(uri, "demo")
    result: dict[str, Any] = {"end": "finished", "metrics": {"val/loss": 1.0}}
    sweep.add(SweepJob(number=0, recipe="gpt", name="", run_id=None, result=Result(**result), objective="val/los"))
    assert "no metric val/los; it has: val/loss; did you mean 'val/loss'?" in caplog.text


def test_a_job_that_cannot_be_started_does_not_end_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bugs: one job whose worker dies at its start cancels the jobs after it; a single run's failure is no error."""
    from stabletrain.cli.summary import PrintingReporter, exit_code, summarize
    from stabletrain.launch import launcher

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "check_jobs", lambda *_: None)

    def start(job: launcher.Job, *_: object) -> launcher.FinishedJob:
        if job.number in (0, None):
            raise launcher.StartFailed("the worker was ended by signal 9")
        config = {**launcher.run_config(job.composed, ()), "run_dir": str(tmp_path)}
        return launcher.FinishedJob(
            recipe="digits_cnn", overrides=(), config=config, result=Result(end="finished"), number=job.number
        )

    monkeypatch.setattr(launcher, "_run_job", start)
    request = launcher.LaunchRequest(recipe="digits_cnn", overrides=("seed=1,2", "logger=none"), multirun=True)
    finished = launcher.run(request, launcher.prepare(request), PrintingReporter())
    assert [done.result.end for done in finished if done.result] == ["failed", "finished"]
    assert exit_code(finished) == 1
    assert "not started: the worker was ended by signal 9" in summarize(finished)
    assert "job 0 cannot be started, the sweep goes on: the worker was ended by signal 9" in capsys.readouterr().err
    one = launcher.LaunchRequest(recipe="digits_cnn", overrides=("logger=none",))
    with pytest.raises(launcher.StartFailed, match="signal 9"):
        launcher.run(one, launcher.prepare(one), PrintingReporter())
