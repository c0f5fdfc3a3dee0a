"""The logger within an MLflow run that somebody else has started, and at signals: one run, and its right status."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import fits
import mlflow
import pytest
from fits import HEALTHY, Net, batches
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from stabletrain.tracking import MLflowLogger, runs


class Logged(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Raise(Callback):
    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        raise self.error


def fit(logger, folder, *callbacks):
    return fits.fit(Logged(), batches(HEALTHY, HEALTHY), *callbacks, logger=logger, default_root_dir=folder)


@pytest.fixture(autouse=True)
def store(uri, monkeypatch):
    """MLflow's own default store; and nothing is left active for the next test."""
    monkeypatch.setattr("stabletrain.tracking.record.packages", lambda: {"stabletrain": "1"})
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    mlflow.set_tracking_uri(uri)
    yield uri
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)


def all_runs(client):
    found = client.search_runs([item.experiment_id for item in client.search_experiments()])
    return {run.info.run_id: run.info.status for run in found}


def test_within_start_run(client, tmp_path):
    """Bug: a second run beside the script's, or the script's is ended by the first of several fits."""
    logger = MLflowLogger(tags={"note": "x"})
    with mlflow.start_run() as first:
        assert pickle.loads(pickle.dumps(logger)).version == first.info.run_id  # as spawned ranks get it
        fit(logger, tmp_path)
        assert client.get_run(first.info.run_id).info.status == "RUNNING"
        fit(logger, tmp_path)
        mlflow.log_metric("mine", 1.0)
    with mlflow.start_run() as second:
        fit(logger, tmp_path)
        with mlflow.start_run(nested=True) as third:
            fit(MLflowLogger(run_id=third.info.run_id), tmp_path)
            assert client.get_run(third.info.run_id).info.status == "RUNNING"
    assert all_runs(client) == dict.fromkeys((each.info.run_id for each in (first, second, third)), "FINISHED")
    run = client.get_run(first.info.run_id)
    assert {"loss", "mine"} <= set(run.data.metrics)
    assert len(client.get_metric_history(first.info.run_id, "loss")) == 4
    assert run.data.tags["note"] == "x"
    assert not [tag for tag in run.data.tags if tag.startswith("stabletrain.owner")]
    assert client.get_metric_history(third.info.run_id, "loss")
    assert (logger.name, logger.version) == ("Default", second.info.run_id)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SIGTERMException()])
def test_the_scripts_run_is_ended_by_the_script(client, tmp_path, error):
    """Bug: a status of ours, which the script's then overwrites, or which hides that the script went on."""
    with mlflow.start_run() as run:
        with pytest.raises((type(error), SystemExit)):
            fit(MLflowLogger(), tmp_path, Raise(error))
        assert client.get_run(run.info.run_id).info.status == "RUNNING"
    assert all_runs(client) == {run.info.run_id: "FINISHED"}


def test_another_store_or_parent_is_another_run(client, template, tmp_path):
    """Bug: a store, run or parent that was asked for is ignored because a run is active."""
    shutil.copy(template, tmp_path / "b.db")
    other = runs.create_run(client.tracking_uri, "demo")
    with mlflow.start_run() as active:
        elsewhere, child = MLflowLogger(f"sqlite:///{tmp_path}/b.db"), MLflowLogger(parent_run_id=active.info.run_id)
        given = MLflowLogger(run_id=other)
        for logger in (elsewhere, child, given):
            logger.log_metrics({"a": 1.0}, 0)
            logger.finalize("success")
        statuses = all_runs(client)
    assert statuses == {active.info.run_id: "RUNNING", child.version: "FINISHED", other: "FINISHED"}
    assert elsewhere.version not in statuses


def test_after_the_scripts_run_has_ended(client, tmp_path):
    """Bug: the metrics of a test after the fit open a second run, or set the first to RUNNING again."""
    logger = MLflowLogger()
    with mlflow.start_run() as run:
        fit(logger, tmp_path)
    logger.log_metrics({"test": 1.0}, 0)
    logger.finalize("success")
    assert all_runs(client) == {run.info.run_id: "FINISHED"}
    assert client.get_run(run.info.run_id).data.metrics["test"] == 1.0


def test_the_run_of_a_process_that_mlflow_started(client, monkeypatch):
    """Bug: a script under `mlflow run` opens a second run."""
    run_id = client.create_run("0").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
    logger = MLflowLogger()
    logger.log_metrics({"a": 1.0}, 0)
    logger.finalize("failed")
    assert all_runs(client) == {run_id: "RUNNING"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "FINISHED"),
        (RuntimeError("boom"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SIGTERMException(), "KILLED"),
    ],
)
def test_autologging(client, tmp_path, error, status):
    """Bug: a second run; or FINISHED after Ctrl-C and SIGTERM, which Lightning turns into SystemExit."""
    from mlflow.utils.autologging_utils.safety import with_managed_run

    def patched(original):
        return original()

    def train():
        fit(MLflowLogger(), tmp_path, *([] if error is None else [Raise(error)]))

    managed = with_managed_run("pytorch", patched, tags={"mlflow.autologging": "pytorch"})
    with nullcontext() if error is None else pytest.raises((type(error), SystemExit)):
        managed(train)
    assert list(all_runs(client).values()) == [status]
    assert mlflow.active_run() is None


SIGNALLED = """
import os, signal, sys, time
from stabletrain.tracking.end_signals import EndSignals
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signals = EndSignals(lambda: print("closed", flush=True))
if sys.argv[2] == "removed":
    signals.remove()
with signals.postponed():
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    print("later", flush=True)
time.sleep(10 if sys.argv[1] != "SIGUSR2" else 0)
"""


@pytest.mark.parametrize(
    ("name", "state", "said"),
    [
        ("SIGHUP", "", "later closed"),
        ("SIGQUIT", "", "later closed"),
        ("SIGUSR1", "", "later closed"),
        ("SIGXCPU", "", "later closed"),
        ("SIGTERM", "", ""),
        ("SIGUSR2", "", "later"),
        ("SIGHUP", "removed", ""),
    ],
)
def test_a_signal_ends_the_process_as_before(name, state, said):
    """Bug: a signal's effect changes; the run stays RUNNING; or a call to the store is interrupted by another."""
    command = [sys.executable, "-c", SIGNALLED, name, state]
    environment = {key: value for key, value in os.environ.items() if key != "SLURM_JOB_ID"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == said.split(), done.stderr
    assert done.returncode == (0 if name == "SIGUSR2" else -getattr(signal, name))


SCRIPT = """
import sys, time
from stabletrain.tracking import MLflowLogger
logger = MLflowLogger(sys.argv[1])
logger.log_metrics({"a": 1.0}, 0)
logger.flush()
print(logger.run_id, flush=True)
time.sleep(60)
"""


AUTOLOGGED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import lightning as L
import mlflow
from torch.utils.data import DataLoader
from fits import HEALTHY, Net, batches
from stabletrain.tracking import MLflowLogger

mlflow.set_tracking_uri(sys.argv[1])
mlflow.pytorch.autolog(log_models=False)

class Signal(L.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3 and sys.argv[2] != "none":
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))

trainer = L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[Signal()], logger=MLflowLogger(), log_every_n_steps=1)
trainer.fit(Net(), DataLoader(batches(*[HEALTHY] * 20), batch_size=None))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status"), [("none", "FINISHED"), ("SIGINT", "KILLED"), ("SIGTERM", "KILLED"), ("SIGHUP", "KILLED")]
)
def test_autologging_of_lightning(uri, client, name, status):
    """Bug: two runs of one fit; or a signal leaves autologging's run FINISHED or RUNNING."""
    helpers = Path(fits.__file__).parent
    done = subprocess.run([sys.executable, "-c", AUTOLOGGED, uri, name, helpers], capture_output=True, check=False)
    assert list(all_runs(client).values()) == [status], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_a_script_that_a_signal_ends(uri, client, signum):
    """Bug: its run stays RUNNING for ever; after SIGTERM and SIGKILL until the next script opens the store."""
    with subprocess.Popen([sys.executable, "-c", SCRIPT, uri], stdout=subprocess.PIPE, text=True) as script:
        run_id = script.stdout.readline().strip()
        script.send_signal(signum)
        assert script.wait(60) == -signum
    if signum in (signal.SIGTERM, signal.SIGKILL):
        time.sleep(0.1)
        logger = MLflowLogger(uri)
        logger.log_metrics({"a": 1.0}, 0)
        logger.finalize("success")
    run = client.get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("KILLED", {"a": 1.0})
