"""What a store or a run's folder from elsewhere cannot do with files."""

import os
from pathlib import Path

import pytest

from stabletrain.tracking import MLflowLogger, StoreError, start_run
from stabletrain.tracking.artifacts import require_safe_location, upload_files
from stabletrain.tracking.runs import create_run


@pytest.fixture
def elsewhere(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("elsewhere")


@pytest.mark.parametrize("form", ["{}", "file://{}", "file:{}", "{cwd}/../{name}", "../{name}", "./link/x"])
def test_a_store_does_not_choose_a_local_folder(uri, client, tmp_path, elsewhere, form):
    """Bug: a database from elsewhere names ~/.ssh as the place of its artifacts, and training writes files there."""
    (tmp_path / "link").symlink_to(elsewhere)
    name = os.path.relpath(elsewhere, tmp_path.parent)
    location = form.format(elsewhere, cwd=tmp_path, name=name)
    experiment = client.create_experiment("hostile", artifact_location=location)
    with pytest.raises(StoreError, match=r"outside of its own.*logger\.experiment.*MLFLOW_DEFAULT_ARTIFACT_ROOT"):
        start_run({"seed": 1}, uri=uri, experiment="hostile")
    with pytest.raises(StoreError, match="outside of its own"):
        MLflowLogger(uri, experiment="hostile").log_metrics({"a": 1.0})
    run_id = client.create_run(experiment).info.run_id
    with pytest.raises(StoreError, match="outside of its own"):
        start_run({"seed": 1}, uri=uri, experiment="demo", run_id=run_id)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="outside of its own"):
        upload_files(uri, run_id, [tmp_path / "file"])
    assert not list(elsewhere.iterdir())


def test_places_that_are_accepted(uri, tmp_path, elsewhere, monkeypatch):
    """Bug: MLflow's own default, a server's proxy or a bucket is refused; or there is no way to allow a folder."""
    for location in ("mlflow-artifacts:/1", "s3://bucket/x", f"{tmp_path}/mlruns/1", (tmp_path / "a b").as_uri()):
        require_safe_location(uri, location)
    with pytest.raises(StoreError):
        require_safe_location("http://localhost", str(elsewhere / "1"))
    monkeypatch.setenv("MLFLOW_DEFAULT_ARTIFACT_ROOT", str(elsewhere))
    require_safe_location("http://localhost", str(elsewhere / "1"))


def test_links_and_pipes_in_a_runs_folder_are_not_uploaded(uri, client, tmp_path, elsewhere):
    """Bug: a run's folder from elsewhere links to a private file, which is sent to the store; a pipe hangs the end."""
    (elsewhere / "secret").write_text("secret")
    run_id = create_run(uri, "demo")
    folder = tmp_path / "run"
    (folder / "diagnosis-1" / "sub").mkdir(parents=True)
    (folder / "result.json").symlink_to(elsewhere / "secret")
    (folder / "diagnosis-2").symlink_to(elsewhere)
    (folder / "diagnosis-1" / "report.json").write_text("{}")
    (folder / "diagnosis-1" / "sub" / "plot.png").write_text("")
    (folder / "diagnosis-1" / "key").symlink_to(elsewhere / "secret")
    (folder / "diagnosis-1" / "keys").symlink_to(elsewhere)
    os.mkfifo(folder / "diagnosis-1" / "pipe")
    (folder / "events.jsonl").write_text("")
    upload_files(uri, run_id, [*sorted(folder.iterdir()), folder / "missing"])
    root = Path(client.download_artifacts(run_id, "."))
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert found == ["diagnosis-1/report.json", "diagnosis-1/sub/plot.png", "events.jsonl"]


@pytest.mark.parametrize("experiment", ["..", "../../x", "/etc", ".", "a/../../b", "~", "a\\b", "x" * 400, "%2e%2e/x"])
def test_names_do_not_lead_out_of_the_artifact_folder(uri, client, tmp_path, experiment):
    """Bug: an experiment or run called ../../x puts its artifacts beside the folder of the store."""
    run_id = start_run({"seed": 1}, uri=uri, experiment=experiment, name="../../name")
    root = client.get_run(run_id).info.artifact_uri.removeprefix("file://")
    assert Path(root).resolve().is_relative_to((tmp_path / "mlartifacts").resolve())
    assert len(Path(root).relative_to(tmp_path / "mlartifacts").parts) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlartifacts", "mlflow.db", "mlflow.db.lock"]


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out"])
def test_a_logged_artifacts_name_does_not_lead_out(uri, tmp_path, caplog, name):
    """Bug: log_artifact(path, name="../x") writes beside the run's artifacts, or ends the run."""
    (tmp_path / "file").write_text("x")
    logger = MLflowLogger(uri)
    logger.log_artifact(tmp_path / "file", name=name)
    logger.finalize("success")
    assert not list(tmp_path.rglob("out")) or name == "/out"
    assert not Path("/out").exists()
