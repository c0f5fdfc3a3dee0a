import copy
import json
import logging
import math
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import closing
from pathlib import Path

import fits
import pytest
import torch
from fits import HEALTHY, Net, batches
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from stabletrain import SwapOptimizer
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.signal_watch import Interrupted, Terminated
from stabletrain.tracking import MLflowLogger, StoreError, runs
from stabletrain.tracking.runs import create_run


class Logged(Net):
    """Logs a loss and a hyper-parameter."""

    def __init__(self, width=1):
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Raise(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == 2:
            raise self.error


def fit(logger, folder, *callbacks, steps=5):
    """Train for a number of steps; returns the trainer."""
    return fits.fit(Logged(), batches(*[HEALTHY] * steps), *callbacks, logger=logger, default_root_dir=folder)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr("stabletrain.tracking.record.packages", lambda: {"stabletrain": "1"})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def test_a_plain_script(uri, client, tmp_path):
    """Bug: with defaults the logger raises, blocks, or leaves metrics, parameters, checkpoints or the table of
    parameter groups out."""
    logger = MLflowLogger(tags={"note": "x"})
    assert logger.version is None
    trainer = fit(logger, tmp_path, ModelCheckpoint(every_n_train_steps=2), SwapOptimizer(torch.optim.AdamW))
    run = client.get_run(logger.version)
    assert run.info.status == "FINISHED"
    assert run.info.end_time is not None
    assert [point.step for point in client.get_metric_history(logger.version, "loss")] == list(range(5))
    assert run.data.params["width"] == "1"
    assert run.data.tags["note"] == "x"
    assert run.data.tags["checkpoint.last"] == trainer.checkpoint_callback._last_checkpoint_saved
    assert run.data.tags["checkpoint.last"].startswith(f"{tmp_path}/stabletrain/{logger.version}/checkpoints")
    assert run.data.tags["checkpoint.last_step"] == "4"
    assert run.data.tags["checkpoint.best"]
    assert [item.path for item in client.list_artifacts(logger.version)] == ["environment", "parameter_groups.txt"]
    table = Path(client.download_artifacts(logger.version, "parameter_groups.txt", str(tmp_path))).read_text()
    assert table.startswith("parameter groups of AdamW (in place of AdamW)\ngroup ")
    assert {line.split()[0] for line in table.splitlines()[2:]} == {"weight", "bias", "norm"}


@pytest.mark.parametrize(
    ("error", "left", "status"),
    [
        (RuntimeError("boom"), RuntimeError, "FAILED"),
        (KeyboardInterrupt(), SystemExit, "KILLED"),
        *((each(), each, "KILLED") for each in both(SIGTERMException)),
        (Interrupted(signal.SIGINT), Interrupted, "KILLED"),
        (Terminated(143), SystemExit, "KILLED"),
        (SystemExit(0), SystemExit, "FAILED"),
    ],
)
def test_status_after_an_exception(uri, client, tmp_path, error, left, status):
    """Bug: Ctrl-C is FAILED, a failure is FINISHED, or the last metrics before it are lost."""
    logger = MLflowLogger(uri)
    with pytest.raises(left):
        fit(logger, tmp_path, Raise(error))
    assert client.get_run(logger.version).info.status == status
    assert client.get_metric_history(logger.version, "loss")


def test_resume_is_running_then_finished(uri, client, tmp_path):
    """Bug: a resumed run stays FAILED while it trains; a changed parameter aborts it."""
    run_id = create_run(uri, "demo")
    client.log_param(run_id, "width", "99")
    client.set_terminated(run_id, "FAILED")
    seen = []

    class ReadStatus(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append(client.get_run(run_id).info.status)

    logger = MLflowLogger(uri, run_id=run_id)
    fit(logger, tmp_path, ReadStatus(), steps=2)
    run = client.get_run(run_id)
    assert seen == ["RUNNING"] * 2
    assert run.info.status == "FINISHED"
    assert run.data.params["width"] == "99"
    assert run.data.tags["changed.width"] == "1"


def test_fit_twice(uri, client, tmp_path):
    """Bug: the writer ends with the first fit, and the second one logs into nothing."""
    logger = MLflowLogger(uri)
    fit(logger, tmp_path, steps=2)
    fit(logger, tmp_path, steps=4)
    assert len(client.get_metric_history(logger.version, "loss")) == 6
    assert client.get_run(logger.version).info.status == "FINISHED"


def test_ten_thousand_metrics(uri, client):
    """Bug: a long queue is cut at the end, or arrives out of order."""
    logger = MLflowLogger(uri)
    for step in range(2000):
        logger.log_metrics({"a": step, "b": 1.0, "c": 2.0, "d": 3.0, "e@x": 4.0}, step=step)
    logger.finalize("success")
    names = client.get_run(logger.version).data.metrics
    assert len(names) == 5
    for name in names:
        history = client.get_metric_history(logger.version, name)
        assert [point.step for point in history] == list(range(2000))
    assert [point.value for point in client.get_metric_history(logger.version, "a")] == list(range(2000))


def test_a_failing_store_does_not_end_training(uri, client, tmp_path, caplog, monkeypatch):
    """Bug: one write error in the background kills the run or silently loses its metrics."""
    logger = MLflowLogger(uri, save_dir=tmp_path)
    real, broken = logger.experiment.log_batch, OSError("database is away")

    def log_batch(run_id, metrics=(), params=(), tags=(), **arguments):
        if metrics:
            raise broken
        return real(run_id, params=params, tags=tags, **arguments)

    monkeypatch.setattr(logger.experiment, "log_batch", log_batch)
    with caplog.at_level(logging.WARNING, logger="stabletrain"):
        trainer = fit(logger, tmp_path, ModelCheckpoint(every_n_train_steps=1))
    assert trainer.global_step == 5
    assert client.get_run(logger.version).info.status == "FINISHED"
    lines = [json.loads(line) for line in (tmp_path / "metrics-unsent.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["key"] == "loss"] == list(range(5))
    assert len([record for record in caplog.records if "does not accept metrics" in record.getMessage()]) == 1
    assert "does not accept the metrics in" in caplog.text


def test_failing_tags_and_status_do_not_end_training(uri, tmp_path, caplog, monkeypatch):
    """Bug: the final status cannot be written, and its error hides the exception that ended the run."""
    monkeypatch.setattr("stabletrain.tracking.logger.time.sleep", lambda seconds: None)
    logger = MLflowLogger(uri, save_dir=tmp_path)

    def refuse(*arguments, **named):
        raise OSError("database is away")

    for name in ("log_batch", "set_terminated", "log_artifact"):
        monkeypatch.setattr(logger.experiment, name, refuse)
    (tmp_path / "file.txt").write_text("x")
    logger.log_artifact(tmp_path / "file.txt")
    with pytest.raises(RuntimeError, match="boom"):
        fit(logger, tmp_path, Raise(RuntimeError("boom")))
    assert "does not accept the artifact file.txt, parameters, metrics in" in caplog.text
    assert "final status of run" in caplog.text


def test_unusable_store_is_said_before_training(tmp_path):
    """Bug: the database is found to be damaged after an hour of training."""
    (tmp_path / "mlflow.db").write_bytes(b"\x00garbage" * 1000)
    with pytest.raises(StoreError, match="damaged"):
        fit(MLflowLogger(f"sqlite:///{tmp_path}/mlflow.db"), tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_metrics(uri, client, bad):
    """Bug: an infinity is stored as 1.8e308; a resumed run counts from zero."""
    logger = MLflowLogger(uri)
    logger.log_metrics({"loss": bad, "tensor": torch.tensor(bad)}, step=1)
    logger.finalize("success")
    again = MLflowLogger(uri, run_id=logger.version)
    again.log_metrics({"loss": bad}, step=2)
    again.finalize("success")
    assert all(math.isnan(point.value) for point in client.get_metric_history(logger.version, "loss"))
    counts = client.get_metric_history(logger.version, "stability_nonfinite/loss")
    assert [(point.step, point.value) for point in counts] == [(1, 1.0), (2, 2.0)]


def test_odd_metrics(uri, client, caplog):
    """Bug: one text among the metrics, or a missing step, costs the others."""
    logger = MLflowLogger(uri)
    logger.log_metrics({"a": 1.0}, step=5)
    logger.log_metrics({"text": "x", "none": None, "b": torch.tensor(2.0), "flag": True})
    logger.finalize("success")
    assert client.get_run(logger.version).data.metrics == {"a": 1.0, "b": 2.0, "flag": 1.0}
    assert client.get_metric_history(logger.version, "b")[0].step == 5
    assert "metric text is not a number" in caplog.text


def test_hyperparameters(uri, client):
    """Bug: nested, long or foreign values are cut at 250 characters or break the run."""
    logger = MLflowLogger(uri)
    logger.log_hyperparams({"model": {"width": 3, "act": torch.nn.ReLU}, "long": "x" * 3000}, {"hp_metric": -1})
    logger.log_hyperparams(Namespace(seed=1))
    logger.finalize("success")
    params = client.get_run(logger.version).data.params
    assert params["model.width"] == "3"
    assert params["long"] == "x" * 3000
    assert params["seed"] == "1"
    assert "ReLU" in params["model.act"]


def test_artifacts(uri, client, tmp_path):
    """Bug: a file given another name keeps the old one, or a folder is refused."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("a")
    logger = MLflowLogger(uri)
    logger.log_artifact(tmp_path / "folder" / "a.txt")
    logger.log_artifact(tmp_path / "folder" / "a.txt", "plots/b.txt")
    logger.log_artifact(tmp_path / "folder", "c")
    with pytest.raises(FileNotFoundError, match="missing"):
        logger.log_artifact(tmp_path / "missing")
    logger.finalize("success")
    names = {item.path for folder in ("", "plots", "c") for item in client.list_artifacts(logger.version, folder)}
    assert {"a.txt", "plots/b.txt", "c/a.txt"} <= names


def test_copies_before_and_after_the_start(uri, client):
    """Bug: a logger with threads and connections cannot be pickled, or its copy opens a second run."""
    logger = MLflowLogger(uri, experiment="demo", run_name="x")
    assert pickle.loads(pickle.dumps(logger)).name == "demo"
    assert copy.deepcopy(logger).version is None
    logger.log_metrics({"a": 1.0}, step=0)
    twin = pickle.loads(pickle.dumps(logger))
    twin.log_metrics({"b": 1.0}, step=0)
    twin.finalize("success")
    logger.finalize("success")
    assert twin.version == logger.version
    assert set(client.get_run(logger.version).data.metrics) == {"a", "b"}


def test_only_rank_zero_writes(uri, client, monkeypatch):
    """Bug: every rank opens a run of its own."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = MLflowLogger(uri)
    logger.experiment.log_batch("x")
    logger.log_metrics({"a": 1.0}, step=0)
    logger.log_hyperparams({"a": 1})
    logger.finalize("success")
    assert logger.version is logger.run_id is None
    assert client.search_runs([item.experiment_id for item in client.search_experiments()]) == []


@pytest.mark.parametrize(("last", "status"), [(None, "FINISHED"), (KeyboardInterrupt(), "KILLED")])
def test_the_process_ends_without_finalize(uri, client, monkeypatch, last, status):
    """Bug: a run without a Trainer stays RUNNING, or is FINISHED after Ctrl-C."""
    if last is not None:
        monkeypatch.setattr("sys.last_value", last, raising=False)
    logger = MLflowLogger(uri)
    logger.log_metrics({"a": 1.0}, step=0)
    logger._session._at_exit()
    run = client.get_run(logger.version)
    assert (run.info.status, run.data.metrics) == (status, {"a": 1.0})


@pytest.mark.slow
def test_a_script_without_a_trainer(uri, client):
    """Bug: without a Trainer finalize is never called, so the last metrics are lost and the run is RUNNING for ever."""
    code = (
        "import sys; from stabletrain.tracking import MLflowLogger\n"
        "logger = MLflowLogger(sys.argv[1]); logger.log_metrics({'a': 1.0}, step=0); print(logger.run_id)\n"
        "raise KeyError('x')"
    )
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, check=False)
    run = client.get_run(done.stdout.strip())
    assert "KeyError" in done.stderr
    assert (run.info.status, run.data.metrics) == ("FAILED", {"a": 1.0})


def test_importing_is_light():
    """Bug: `stabletrain --help` waits seconds for torch, Lightning and MLflow."""
    code = "import sys, stabletrain.tracking; print([n for n in ('torch', 'lightning', 'mlflow') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class Break(Callback):
    """Take the store away after a batch, and give it back after another one."""

    def __init__(self, at, action, back=None, repair=None):
        self.at, self.action, self.back, self.repair = at, action, back, repair

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx in (self.at, self.back):
            trainer.logger.flush()
            (self.action if batch_idx == self.at else self.repair)()
        elif batch_idx % 5 == 0:
            trainer.logger.flush()


@pytest.fixture
def breaks(uri, tmp_path):
    """Ways to take a store away: name -> (break, repair)."""
    path = tmp_path / "mlflow.db"
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as other:
        yield {
            "deleted": (lambda: path.rename(tmp_path / "gone"), lambda: (tmp_path / "gone").rename(path)),
            "emptied": (
                lambda: (path.rename(tmp_path / "gone"), path.touch()),
                lambda: (tmp_path / "gone").rename(path),
            ),
            "locked": (lambda: other.execute("BEGIN IMMEDIATE"), lambda: other.execute("ROLLBACK")),
        }


@pytest.mark.parametrize(
    ("way", "recovers"),
    [
        ("deleted", False),
        ("emptied", True),
        ("locked", True),
        pytest.param("deleted", True, marks=pytest.mark.slow),
        pytest.param("emptied", False, marks=pytest.mark.slow),
        pytest.param("locked", False, marks=pytest.mark.slow),  # waits for the lock at the end of the run, too
    ],
)
def test_a_store_that_is_taken_away_during_training(uri, client, tmp_path, caplog, capfd, breaks, way, recovers):
    """Bug: 34 tracebacks on the terminal; metrics written to a deleted file are lost without a word."""
    broken, repair = breaks[way]
    saves = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3, save_top_k=-1)
    logger = MLflowLogger(uri, save_dir=tmp_path)
    started = time.monotonic()
    fit(logger, tmp_path, Break(10, broken, 20 if recovers else None, repair), saves, steps=30)
    assert time.monotonic() - started < 30
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("stabletrain.tracking")]
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    unsent = tmp_path / "metrics-unsent.jsonl"
    assert "metrics-unsent.jsonl" in ours[0]
    if recovers:
        assert all("accepts metrics again" in line for line in ours[1:2])
        assert len(ours) <= 2
        assert client.get_run(logger.version).info.status == "FINISHED"
    else:
        assert ["final status" in line for line in ours] == [False, True]
        repair()
        assert runs.upload_unsent(uri, unsent, run_id=logger.version) > 10
        assert client.get_run(logger.version).info.status == "RUNNING"
    assert not unsent.exists()
    assert sorted(point.step for point in client.get_metric_history(logger.version, "loss")) == list(range(30))


def test_a_full_store_is_one_line(uri, tmp_path, caplog, capfd, monkeypatch):
    """Bug: every batch of metrics is a traceback of MLflow's on the terminal."""
    from sqlalchemy.exc import OperationalError
    from sqlalchemy.orm import Session

    logger = MLflowLogger(uri, save_dir=tmp_path)
    logger.log_metrics({"a": 0.0}, 0)
    assert logger.flush()

    def full(*_, **__):
        raise OperationalError("insert", {}, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(Session, "execute", full)
    for step in range(1, 6):
        logger.log_metrics({"a": 0.0}, step)
        assert logger.flush()
    assert len(caplog.records) == 1
    assert "disk is full" in caplog.text
    assert "Traceback" not in caplog.text + capfd.readouterr().err
    monkeypatch.undo()
    logger.finalize("success")
