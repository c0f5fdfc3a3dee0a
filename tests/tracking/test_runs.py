import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from stabletrain.tracking import StoreError, set_final_status, start_run, upload_unsent
from stabletrain.tracking.runs import create_run

CONFIG = {
    "recipe": "char_gpt",
    "seed": 7,
    "run_dir": "/somewhere",
    "resume": None,
    "model": {"_target_": "stabletrain.workloads.CharGPT", "layers": 4},
    "data": {"_target_": "stabletrain.workloads.ShakespeareData", "sha256": "abc"},
    "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.001},
    "plugins": {"clip": {"_target_": "stabletrain.ClipZScore"}, "spike": None},
    "precision": {"precision": "32-true"},
    "strategy": {"strategy": "auto"},
    "logger": {"_target_": "stabletrain.tracking.MLflowLogger", "run_id": None},
    "launch": {"kind": "local", "processes": 2},
    "choices": {"plugins/clip": "zscore", "plugins/spike": "none", "optimizer": "adamw"},
}


@pytest.fixture(autouse=True)
def quick_record(monkeypatch):
    """The record of the environment has tests of its own, and takes a while."""
    monkeypatch.setattr("stabletrain.tracking.record.packages", lambda: {"stabletrain": "1"})


def artifact(client, run_id, name):
    from pathlib import Path

    return Path(client.download_artifacts(run_id, name)).read_text()


def test_a_new_run_has_everything(uri, client):
    """Bug: a run cannot be found, compared or reproduced because a tag, parameter or artifact is missing."""
    run_id = start_run(CONFIG, uri=uri, experiment="demo", name="first", tags={"note": "x"})
    run = client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == "first"
    params, tags = run.data.params, run.data.tags
    assert params["optimizer.lr"] == "0.001"
    assert params["choices.plugins/clip"] == "zscore"
    assert "optimizer._partial_" not in params
    assert not {"run_dir", "resume", "logger.run_id"} & set(params)
    expected = {"recipe": "char_gpt", "plugins": "clip=zscore", "precision": "32-true", "strategy": "auto"}
    expected |= {"world_size": "2", "seed": "7", "data.digest": "abc", "note": "x"}
    assert expected.items() <= tags.items()
    assert tags["stabletrain.version"]
    saved = yaml.safe_load(artifact(client, run_id, "run.yaml"))
    assert saved["logger"]["run_id"] == run_id
    assert {**saved, "logger": CONFIG["logger"]} == CONFIG
    assert CONFIG["logger"]["run_id"] is None, "the caller's configuration is not changed"
    assert "sha" in json.loads(artifact(client, run_id, "environment/git.json"))
    # the environment of this process is not the worker's
    assert {each.path for each in client.list_artifacts(run_id, "environment")} <= {
        f"environment/{name}" for name in ("git.json", "git.diff", "git-stabletrain.diff")
    }


def test_artifacts_lie_beside_the_database(uri, client, tmp_path, monkeypatch):
    """Bug: artifacts of one experiment go to whatever folder the first process was in."""
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    run_id = start_run({}, uri=uri, experiment="a/b c")
    assert client.get_run(run_id).info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert not list(other.iterdir())


def test_two_runs_under_a_parent(uri, client):
    """Bug: the jobs of a sweep are not found under their sweep."""
    parent = start_run({"recipe": "sweep"}, uri=uri, experiment="demo")
    children = {start_run(CONFIG, uri=uri, experiment="demo", parent_run_id=parent) for _ in range(2)}
    experiment = client.get_run(parent).info.experiment_id
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_id for run in found} == children


def test_resume_with_changed_parameters(uri, client):
    """Bug: MLflow aborts a resumed run because one setting changed, or the run stays FINISHED while it trains."""
    run_id = start_run(CONFIG, uri=uri, experiment="demo")
    set_final_status(uri, run_id, "FAILED")
    changed = {**CONFIG, "optimizer": {**CONFIG["optimizer"], "lr": 0.002}, "new": {"key": 1}}
    for expected in ("1", "2"):
        assert start_run(changed, uri=uri, experiment="demo", run_id=run_id) == run_id
        run = client.get_run(run_id)
        assert run.info.status == "RUNNING"
        assert run.data.params["optimizer.lr"] == "0.001"
        assert run.data.params["new.key"] == "1"
        assert run.data.tags["changed.optimizer.lr"] == "0.002"
        assert [key for key in run.data.tags if key.startswith("changed.")] == ["changed.optimizer.lr"]
        assert run.data.tags["stabletrain.resumes"] == expected
    assert yaml.safe_load(artifact(client, run_id, "run.yaml"))["optimizer"]["lr"] == 0.001
    assert yaml.safe_load(artifact(client, run_id, "resume-2/run.yaml"))["optimizer"]["lr"] == 0.002


def test_long_parameters(uri, client):
    """Bug: a parameter is cut at 250 characters, or MLflow refuses one of 7000 and with it the run."""
    config = {"a": "x" * 5999, "b": "y" * 7000, "many": {f"k{index}": index for index in range(250)}}
    params = client.get_run(start_run(config, uri=uri, experiment="demo")).data.params
    assert params["a"] == "x" * 5999
    assert len(params["b"]) == 6000
    assert "7000 characters" in params["b"]
    assert len(params) == 252


def test_a_final_status_is_set_once(uri, client):
    """Bug: the launcher's late FINISHED hides a failure that the run itself reported."""
    run_id = start_run({}, uri=uri, experiment="demo")
    assert set_final_status(uri, run_id, "FAILED") == "FAILED"
    assert set_final_status(uri, run_id, "FINISHED") == "FAILED"
    assert set_final_status(uri, run_id, "KILLED", force=True) == "KILLED"
    assert set_final_status(uri, run_id, "KILLED") == "KILLED"
    assert client.get_run(run_id).info.status == "KILLED"


def test_the_launcher_sets_the_status_of_a_killed_worker(uri, client):
    """Bug: after SIGKILL (out of memory) a run is shown as RUNNING for ever."""
    run_id = start_run({}, uri=uri, experiment="demo")
    code = (
        "import sys, time; from stabletrain.tracking import MLflowLogger\n"
        "logger = MLflowLogger(sys.argv[1], run_id=sys.argv[2])\n"
        "logger.log_metrics({'loss': 1.0}, step=3); logger.flush(); print('ready', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen([sys.executable, "-c", code, uri, run_id], stdout=subprocess.PIPE, env=environment)
    assert worker.stdout.readline() == b"ready\n"
    worker.send_signal(signal.SIGKILL)
    worker.communicate(timeout=30)
    assert client.get_run(run_id).info.status == "RUNNING"
    assert set_final_status(uri, run_id, "KILLED") == "KILLED"
    assert client.get_run(run_id).data.metrics["loss"] == 1.0


def test_deleted_experiment(uri, client):
    """Bug: an experiment that was deleted in the UI gives an error that does not say how to go on."""
    start_run({}, uri=uri, experiment="demo")
    client.delete_experiment(client.get_experiment_by_name("demo").experiment_id)
    with pytest.raises(StoreError, match=r"'demo' was deleted.*experiments restore"):
        start_run({}, uri=uri, experiment="demo")


def test_unknown_run(uri):
    """Bug: a mistyped run id ends in MLflow's traceback."""
    with pytest.raises(StoreError, match=r"no run 'feed'.*run_id"):
        start_run({}, uri=uri, experiment="demo", run_id="feed")


def test_upload_unsent(uri, client, tmp_path):
    """Bug: metrics kept in the file cannot be brought back, or NaN or a line cut off by SIGKILL breaks the file."""
    run_id = start_run({}, uri=uri, experiment="demo")
    now = int(time.time() * 1000)
    rows = [
        {"run_id": run_id, "key": "a", "value": value, "timestamp": now, "step": step}
        for step, value in enumerate([1.0, float("nan"), 3.0])
    ]
    path = tmp_path / "metrics-unsent.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2) + '{"run_id": "ab')
    assert upload_unsent(uri, path) == 6
    assert not path.exists()
    history = client.get_metric_history(run_id, "a")
    assert sorted(point.step for point in history) == [0, 1, 2]


@pytest.mark.parametrize(
    "line",
    [
        b'{"run_id": "ID", "ke',
        b"\0" * 100,
        b'{"run_id": "ID", "key": "\xff", "value": 1.0, "timestamp": 1, "step": 1}',
        b"[]",
        b'{"run_id": "ID"}',
        b'{"run_id": "ID", "key": "a@b", "value": 1.0, "timestamp": 1, "step": 1}',
        b'{"run_id": "ID", "key": 5, "value": 1.0, "timestamp": 1, "step": 1}',
        b'{"run_id": "ID", "key": "a", "value": "x", "timestamp": 1, "step": 1}',
        b'{"run_id": "ID", "key": "a", "value": 1.0, "timestamp": 1, "step": 1e3}',
        b'{"run_id": "ID", "key": "a", "value": 1.0, "timestamp": 1, "step": 99999999999999999999999}',
        b'{"run_id": ["ID"], "key": "a", "value": 1.0, "timestamp": 1, "step": 1}',
    ],
)
def test_a_damaged_line_costs_no_other_metric(uri, client, tmp_path, line, caplog):
    """Bug: one damaged line keeps all metrics of the file out of the store, or is a traceback."""
    run_id = create_run(uri, "demo")
    path = tmp_path / "metrics-unsent.jsonl"
    good = [json.dumps({"run_id": run_id, "key": "a", "value": 1.0, "timestamp": 1, "step": step}) for step in (1, 2)]
    path.write_bytes(b"\n".join([good[0].encode(), line.replace(b"ID", run_id.encode()), good[1].encode()]))
    assert upload_unsent(uri, path, run_id=run_id) == 2
    assert "line 2" in caplog.text


def test_metrics_of_another_run_wait_for_it(uri, client, tmp_path):
    """Bug: of two scripts in one folder, the first to end deletes the other's metrics."""
    runs = [create_run(uri, "demo") for _ in range(2)]
    path = tmp_path / "metrics-unsent.jsonl"
    point = {"key": "a", "value": float("nan"), "timestamp": 1, "step": 1}
    path.write_text("".join(json.dumps({"run_id": run} | point) + "\n" for run in runs))
    for run in runs:
        assert upload_unsent(uri, path, run_id=run) == 1
        assert len(client.get_metric_history(run, "a")) == 1
    assert list(tmp_path.glob("metrics-*")) == []
