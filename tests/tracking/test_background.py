"""What is sent to MLflow while a run trains: soon, and without holding anything up."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fits
import pytest

from stabletrain.launch import background
from stabletrain.runtime.records.steps_file import StepsFile
from stabletrain.tracking import MLflowLogger
from stabletrain.tracking.runs import create_run
from stabletrain.tracking.system_metrics import SystemMetrics, this_node


def soon(condition: Callable[[], object]) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return bool(condition())


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stabletrain.tracking.record.packages", dict)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    monkeypatch.setattr(background, "_LOOK_EVERY", 0.02)
    monkeypatch.setattr(background, "_REST", 0.0)


def test_while_a_run_trains(uri: str, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: nothing is sent before the end of the run; the record is sent once only; a store that fails ends the
    thread, or is a warning for each try; the run's end waits for it; system metrics of a resumed run start at 0 again,
    or end at once; a script's logger does not measure."""
    run_id, folder = create_run(uri, "demo"), tmp_path / "run"

    def recorded() -> int:
        return sum(each.file_size for each in client.list_artifacts(run_id) if each.path == "steps.bin")

    (folder / "checkpoints").mkdir(parents=True)
    file = StepsFile(folder / "steps.bin")
    uploads = background.CheckpointUploads(uri, run_id, folder)
    for step in range(2):
        file.append(step, 1.0, 1.0, 1)
        file.flush()
        (folder / "checkpoints" / f"step={step}.ckpt").touch()
        assert soon(lambda size=17 * (step + 1): recorded() == size)
    experiment = client.get_run(run_id).info.experiment_id
    assert soon(lambda: len(client.search_logged_models([experiment])) == 2)

    file.close()
    caplog.clear()
    (tmp_path / "mlflow.db").rename(tmp_path / "away.db")
    (folder / "checkpoints" / "step=2.ckpt").touch()
    said: Any = lambda: [each for each in caplog.records if "not listed in MLflow yet" in each.message]  # noqa: E731
    assert soon(said)
    (tmp_path / "away.db").rename(tmp_path / "mlflow.db")
    assert soon(lambda: len(client.search_logged_models([experiment])) == 3)
    assert len(said()) == 1
    started = time.monotonic()
    uploads.stop()
    assert time.monotonic() - started < 5

    def steps() -> list[int]:
        return [point.step for point in client.get_metric_history(run_id, "system/cpu_utilization_percentage")]

    client.set_terminated(run_id)
    logger = MLflowLogger(uri, run_id=run_id, save_dir=folder, system_metrics=True)
    mine = fits.fit(fits.Net(), fits.batches(*[fits.HEALTHY] * 2), logger=logger, log_every_n_steps=1)
    assert mine.global_step == 2
    client.update_run(run_id, status="RUNNING")
    for name in ("system/cpu_utilization_percentage", "system/node_1/cpu_utilization_percentage"):
        metrics = SystemMetrics(uri, run_id, None if "node" not in name else 1)
        assert soon(lambda name=name: name in client.get_run(run_id).data.metrics)
        metrics.stop()
    known = steps()
    again = SystemMetrics(uri, run_id)
    assert soon(lambda: len(steps()) > len(known))
    again.stop()
    assert steps() == sorted(set(steps()))
    assert logging.getLogger("mlflow.system_metrics.system_metrics_monitor").level == logging.ERROR


@pytest.mark.parametrize(
    ("variables", "node"),
    [
        ({}, None),
        ({"GROUP_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, None),
        ({"GROUP_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 1),
        ({"SLURM_NODEID": "0", "SLURM_NNODES": "2"}, 0),
        ({"SLURM_NODEID": "0", "SLURM_NNODES": "1"}, None),
        ({"GROUP_RANK": "x", "WORLD_SIZE": "4"}, None),
    ],
)
def test_the_number_of_this_node(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], node: int | None) -> None:
    """Bug: the metrics of two machines have one name, or those of a single one have a number."""
    for name in ("GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NODEID", "SLURM_NNODES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert this_node() == node
