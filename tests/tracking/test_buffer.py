"""Runs that begin while their tracking server does not respond: recorded in a local database, and sent later."""

import math
import shutil
from pathlib import Path

import pytest

from stabletrain.errors import UserError
from stabletrain.runtime.records.run_files import UNSENT_RUNS
from stabletrain.tracking import MLflowLogger, buffer
from stabletrain.tracking.buffer import SEND_TO, buffer_uri, open_buffer, send_buffer, tags_for
from stabletrain.tracking.ownership import OWNER, this_process
from stabletrain.tracking.runs import create_run, owner_tags, write_params
from stabletrain.tracking.store_errors import StoreError, StoreUnreachable, translate_errors

DEAD = "http://127.0.0.1:1"


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A run's folder with an empty buffer."""
    place = tmp_path / "run" / UNSENT_RUNS
    place.mkdir(parents=True)
    shutil.copy(template, place / "mlflow.db")
    return tmp_path / "run"


def record(folder: Path, uri: str, run_id: str | None = None, status: str = "FAILED") -> str:
    """A run in the buffer, with one of everything."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    source = open_buffer(folder)
    client = MlflowClient(source)
    found = create_run(source, "demo", name="first", tags={"note": "x", **tags_for(uri, run_id)}, start_time=1000)
    write_params(client, found, {"optimizer": {"lr": 0.1}})
    client.log_batch(
        found, metrics=[Metric("val/loss", value, step, step) for step, value in enumerate([2.0, math.nan])]
    )
    client.log_batch(found, metrics=[Metric("many", float(step), step, step) for step in range(1500)][:1000])
    client.log_batch(found, metrics=[Metric("many", float(step), step, step) for step in range(1000, 1500)])
    client.log_text(found, "a: 1", "environment/run.yaml")
    client.set_terminated(found, status, end_time=2000)
    return found


def test_a_run_is_sent_whole_and_once(uri, client, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: metrics, NaN among them, parameters, tags, artifacts, times or the status are lost; a run that was sent in
    part is sent again as another run; the buffer is deleted before everything is sent."""
    record(folder, uri)
    real = buffer.upload_files
    monkeypatch.setattr(buffer, "upload_files", lambda *_: (_ for _ in ()).throw(StoreUnreachable("away")))
    with pytest.raises(StoreUnreachable):
        send_buffer(folder, uri)
    monkeypatch.setattr(buffer, "upload_files", real)
    (sent,) = send_buffer(folder, uri)
    assert not (folder / UNSENT_RUNS).exists()
    assert send_buffer(folder, uri) == []
    (run,) = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert run.info.run_id == sent.run_id
    assert (run.info.run_name, run.info.status) == ("first", "FAILED")
    assert (run.info.start_time, run.info.end_time) == (1000, 2000)
    assert run.data.params == {"optimizer.lr": "0.1"}
    assert run.data.tags["note"] == "x"
    assert SEND_TO not in run.data.tags
    assert [point.step for point in client.get_metric_history(sent.run_id, "many")] == list(range(1500))
    first, second = client.get_metric_history(sent.run_id, "val/loss")
    assert (first.value, math.isnan(second.value)) == (2.0, True)
    assert Path(client.download_artifacts(sent.run_id, "environment/run.yaml")).read_text() == "a: 1"


def test_a_run_that_exists_is_continued(uri, client, folder: Path) -> None:
    """Bugs: a run whose server went away before the worker began becomes two; one that trains is sent; a run is sent to
    another store than that for which it was recorded, without a word."""
    run_id = create_run(uri, "demo", name="there")
    record(folder, uri, run_id)
    running = create_run(buffer_uri(folder), "demo", tags={**tags_for(uri, None), **owner_tags()})
    with pytest.raises(UserError, match=r"is for the store .*mlflow.db, not for http.*--uri"):
        send_buffer(folder, DEAD)
    assert [sent.run_id for sent in send_buffer(folder, uri)] == [run_id]
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status, run.data.tags["note"]) == ("there", "FAILED", "x")
    assert (folder / UNSENT_RUNS).is_dir()
    assert [sent.buffered for sent in send_buffer(folder, uri, running)] == [running]
    assert not (folder / UNSENT_RUNS).exists()


def test_a_run_whose_process_was_killed_is_sent(uri, client, folder: Path) -> None:
    """Bug: a run that was killed while its server was away stays in the buffer as RUNNING, and is never sent."""
    owner = this_process()._replace(started="0").to_tag()
    create_run(buffer_uri(folder), "demo", tags={**tags_for(uri, None), OWNER: owner})
    (sent,) = send_buffer(folder, uri)
    assert client.get_run(sent.run_id).info.status == "KILLED"


def test_a_buffer_from_elsewhere_decides_no_path(uri, client, folder: Path, tmp_path: Path) -> None:
    """Bug: a folder from somebody else sends files of this user to a server."""
    from mlflow import MlflowClient

    outside = tmp_path.parent / f"{tmp_path.name}-private"
    outside.mkdir()
    (outside / "key").write_text("secret")
    source = MlflowClient(buffer_uri(folder))
    experiment = source.create_experiment("other", artifact_location=outside.as_uri())
    run = source.create_run(experiment, tags={SEND_TO: uri})
    source.set_terminated(run.info.run_id)
    with pytest.raises(StoreError, match="outside of its own folder"):
        send_buffer(folder, uri)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "HTTPConnectionPool(host='x'): Max retries exceeded with url: /a (Caused by X('Connection refused'))",
            "refused",
        ),
        ("API request to endpoint /api failed with error code 503 != 200. Response body: 'no'", "error code 503"),
        ("HTTPConnectionPool(host='x', port=1): Read timed out.", "timed out"),
    ],
)
def test_what_no_answer_is(text: str, reason: str) -> None:
    """Bugs: a proxy's answer for a server that is down ends a run; the message is a paragraph."""
    from mlflow.exceptions import MlflowException

    with (
        pytest.raises(StoreUnreachable, match=rf"http://x: the server does not respond \(.*{reason}\); start"),
        translate_errors("http://x"),
    ):
        raise MlflowException(text)


def test_a_logger_whose_server_does_not_respond(uri, client, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: a script ends since its tracking server is down; what it logged is lost, or sent without its parameters or
    artifacts; a second fit with the logger begins a second run; an unreachable store is said more than once."""
    logger = MLflowLogger(DEAD, experiment="demo", run_name="first", save_dir=folder)
    logger.log_hyperparams({"lr": 0.1})
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    assert logger.flush()
    assert len(caplog.records) == 1
    assert caplog.text.count("does not respond") == 1
    assert "mlflow-unsent" in caplog.text
    logger.finalize("success")
    assert f"send it later with: stabletrain upload {folder} --uri {DEAD}" in caplog.text
    logger.log_metrics({"loss": 2.0}, 3)
    logger.log_text_artifact("x", "note.txt")
    logger.tracking_uri = uri  # the server responds again
    logger.finalize("failed")
    (run,) = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert logger.version == run.info.run_id
    assert (run.info.status, run.data.params) == ("FAILED", {"lr": "0.1"})
    assert [point.value for point in client.get_metric_history(run.info.run_id, "loss")] == [1.0, 1.0, 1.0, 2.0]
    assert Path(client.download_artifacts(run.info.run_id, "note.txt")).read_text() == "x"
    assert not (folder / UNSENT_RUNS).exists()
