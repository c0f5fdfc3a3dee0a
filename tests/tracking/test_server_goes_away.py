"""A tracking server that is killed before, during or at the end of training: training goes on, and nothing is lost."""

import logging
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import fits
import pytest
from fits import HEALTHY, Net, batches
from lightning.pytorch import Callback
from processes import LAUNCH, Cli

from stabletrain.tracking import MLflowLogger, upload_unsent
from stabletrain.tracking.server import local_server_for

TINY = str(LAUNCH / "tiny.yaml")


class Switch:
    """MLflow's server on one port, which is started, killed and started again."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with closing(socket.create_server(("127.0.0.1", 0))) as probe:
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._stack = ExitStack()
        self._leader = 0

    def start(self) -> None:
        server = self._stack.enter_context(local_server_for(self.uri, port=self.port))
        server.wait_until_ready()
        self._leader = server._watch.pid

    def kill(self) -> None:
        os.killpg(self._leader, signal.SIGKILL)
        self._stack.close()


@pytest.fixture
def switch(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Switch]:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr("stabletrain.tracking.record.packages", lambda: {"stabletrain": "1"})
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    (tmp_path / "server").mkdir()
    shutil.copy(template, tmp_path / "server" / "mlflow.db")
    found = Switch(f"sqlite:///{tmp_path}/server/mlflow.db")
    yield found
    found._stack.close()


class Logged(Net):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class At(Callback):
    """Calls something after a batch; before and after it, what was logged is written."""

    def __init__(self, **actions):
        self.actions = {int(name.removeprefix("batch_")): action for name, action in actions.items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx in self.actions:
            trainer.logger.flush()
            self.actions[batch_idx]()


def fit(logger, folder, **actions):
    fits.fit(Logged(), batches(*[HEALTHY] * 30), At(**actions), logger=logger, default_root_dir=folder)


def steps(client, run_id, metric="loss"):
    return sorted(point.step for point in client.get_metric_history(run_id, metric))


@pytest.mark.slow
def test_scripts_and_runs_outlive_their_server(switch, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd) -> None:
    """Bugs: a server that is down when training begins, or that is killed and started again, ends the training; metrics
    of the time in between are lost; a run keeps the status RUNNING, or is in the store twice; a page of tracebacks."""
    from mlflow import MlflowClient

    client = MlflowClient(switch.uri)
    logger = MLflowLogger(switch.address, experiment="late", save_dir=tmp_path / "late")
    fit(logger, tmp_path, batch_10=switch.start)
    (late,) = client.search_runs([client.get_experiment_by_name("late").experiment_id])
    assert late.info.status == "FINISHED"
    assert steps(client, late.info.run_id) == list(range(30))
    assert not (tmp_path / "late" / "mlflow-unsent").exists()

    logger = MLflowLogger(switch.address, experiment="gap", save_dir=tmp_path / "gap")
    fit(logger, tmp_path, batch_5=switch.kill, batch_15=lambda: None, batch_20=switch.start)
    (gap,) = client.search_runs([client.get_experiment_by_name("gap").experiment_id])
    assert gap.info.status == "FINISHED"
    assert steps(client, gap.info.run_id) == list(range(30))

    cli = Cli(tmp_path)
    words = ("train", TINY, "--trust", "tiny_workload", "logger=mlflow", "plugins/nonfinite=skip")
    variables = {"MLFLOW_TRACKING_URI": switch.address, "MLFLOW_DISABLE_TELEMETRY": "true"}
    pauses = ("model.pause=0.1", "model.does=tell", "model.at=1", "trainer.max_steps=100")
    first = cli.start(*words, *pauses, "run_dir=first", **variables)
    log = tmp_path / "first" / "worker.log"
    while not (log.exists() and "tiny step 1" in log.read_text()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    logger = MLflowLogger(switch.address, experiment="cut", save_dir=tmp_path / "cut")
    fit(logger, tmp_path, batch_10=switch.kill, batch_20=lambda: None)
    second = cli(*words, "run_dir=second", **variables)
    out, errors = first.communicate(timeout=120)
    for name, process, text in (("first", first, out), ("second", second, second.stdout)):
        assert process.returncode == 0, errors + second.stderr
        assert f"the run's files are complete; send them later with: stabletrain upload {tmp_path / name}" in text
    assert "Traceback" not in errors + second.stderr + caplog.text + capfd.readouterr().err
    assert "Retrying" not in errors + second.stderr + caplog.text
    assert "HTTPConnectionPool" not in errors + second.stderr + caplog.text

    switch.start()
    assert upload_unsent(switch.address, tmp_path / "cut" / "metrics-unsent.jsonl") > 10
    assert steps(client, logger.version) == list(range(30))
    for name in ("first", "second"):
        sent = cli("upload", name, **variables)
        assert sent.returncode == 0, sent.stderr
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {"first": "FINISHED", "second": "FINISHED"}
    for run in runs:
        names = {each.path for each in MlflowClient(switch.address).list_artifacts(run.info.run_id)}
        assert names >= {"run.yaml", "environment", "result.json"}
        assert steps(client, run.info.run_id, "stability/loss")
