"""The record of a run in its folder, by the worker itself."""

import hashlib
import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

from stabletrain.config.compose import compose
from stabletrain.launch.launcher import run_config
from stabletrain.launch.worker import main

LAUNCH = Path(__file__).parent


@pytest.fixture(autouse=True)
def own_workload(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(LAUNCH))
    monkeypatch.setenv("STABLETRAIN_TRUST", "tiny_workload")
    monkeypatch.setattr("stabletrain.tracking.record.packages", lambda: {"stabletrain": "1"})
    monkeypatch.setattr("stabletrain.launch.worker.WorkerLog", Mock)  # its handlers would stay in this process
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    threads, rng, modes = torch.get_num_threads(), torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    yield
    for signum, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(signum, handler)
    torch.set_num_threads(threads)
    torch.set_rng_state(rng)
    torch.use_deterministic_algorithms(modes)


@pytest.fixture
def config() -> dict[str, Any]:
    composed = compose(str(LAUNCH / "tiny.yaml"), ["trainer.enable_progress_bar=false", "trainer.max_steps=3"])
    return run_config(composed, ["tiny_workload"])


def trained(config: dict[str, Any], folder: Path, **changes: Any) -> tuple[dict[str, Any], Any]:
    """Run the worker in this process; its record by file, and its final weights."""
    folder.mkdir()
    content = {**config, **changes, "run_dir": str(folder)}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    assert main([str(folder / "run.yaml")]) == 0
    record = {path.name: json.loads(path.read_text()) for path in (folder / "environment").glob("*.json")}
    (saved,) = (folder / "checkpoints").glob("step=*.ckpt")
    return record, torch.load(saved, weights_only=True)["state_dict"]


def test_which_of_data_start_and_code_differs(config: dict[str, Any], tmp_path: Path) -> None:
    """Bugs: the checksums of equal runs differ, so that every repeat seems another; other data are taken for another
    start, or the other way round; the record lacks the user's own code, or the worker's settings."""
    record, weights = trained(config, tmp_path / "a")
    again, same = trained(config, tmp_path / "b")
    assert record == again
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    other_data, _ = trained(config, tmp_path / "c", data={"_target_": "tiny_workload.TinyData", "rows": 4})
    other_start, _ = trained(config, tmp_path / "d", seed=1)
    assert record.keys() == {"environment.json", "code.json", "data.json"}

    def differs(found: dict[str, Any]) -> set[str]:
        return {key for key, value in found["data.json"].items() if value != record["data.json"][key]}

    assert differs(other_data) == {"first_batch"}
    assert differs(other_start) == {"initial_weights"}
    digest = hashlib.sha256((LAUNCH / "tiny_workload.py").read_bytes()).hexdigest()
    assert record["code.json"]["tiny_workload"] == {"files": {"tiny_workload.py": digest}}
    environment = record["environment.json"]
    assert environment["torch"]["deterministic_algorithms"] is True
    assert environment["torch"]["deterministic_warn_only"] is True
    assert environment["torch"]["threads"] == config["launch"]["threads"]
    assert (environment["training"]["world_size"], environment["training"]["compiled"]) == (1, False)
    assert [node["rank"] for node in environment["nodes"]] == [0]


def test_a_record_that_cannot_be_written_ends_no_run(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bug: a full disk, or a bug in the record, costs the training."""

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    for name in ("own_record.write_process", "start_record.environment", "start_record.weights_checksum"):
        monkeypatch.setattr(f"stabletrain.tracking.{name}", fail)
    with caplog.at_level(logging.WARNING, logger="stabletrain"):
        trained(config, tmp_path / "a")
    assert "environment is incomplete: OSError: no space left" in caplog.text
