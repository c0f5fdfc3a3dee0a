"""The record of a run's start: on one rank and on several, with fingerprints of all kinds, and without an effect."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import record_on_ranks
import torch
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch import LightningDataModule
from rank_pool import on_ranks

from stabletrain import default_callbacks
from stabletrain.runtime import rng
from stabletrain.tracking.dataset import data_tags
from stabletrain.tracking.start_record import fingerprint_of
from stabletrain.workloads import DigitsData, ShakespeareData


@pytest.fixture(autouse=True)
def quick_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stabletrain.tracking.record.packages", lambda: {"stabletrain": "1"})


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_ranks(tmp_path: Path, kind: str) -> None:
    """Bugs: ranks that wait for each other; a rank's data or shard that does not count; copies of one model that seem
    to be another start than a single process's; a record that changes a bit of the training."""
    first, second = on_ranks(record_on_ranks.train, 2, tmp_path, kind)
    assert all(first[key] and second[key] for key in ("same weights", "other weights"))
    assert second["same"] is None
    same, other = first["same"], first["other"]
    assert same["parts"] == {"first_batch": 1, "initial_weights": {"ddp": 1, "fsdp2": 2}[kind]}
    assert same["ranks"] == 2
    assert same["initial_weights"] == other["initial_weights"]
    assert other["parts"]["first_batch"] == 2
    assert other["first_batch"] != same["first_batch"]


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_rank_0_alone(tmp_path: Path, kind: str) -> None:
    """Bug: a script in which only rank 0 has the logger waits for the others for ever."""
    first, second = on_ranks(record_on_ranks.alone, 2, tmp_path, kind, limit=60.0)
    assert second is None
    assert first is not None
    assert (first["ranks"], first["parts"]["first_batch"]) == (1, 1)
    assert (first["initial_weights"] is None) == (kind == "fsdp2")


def test_two_nodes(tmp_path: Path) -> None:
    """Bugs: only the first node's settings are known; a node of other settings that nobody sees; a host's name."""
    first, second = on_ranks(record_on_ranks.two_nodes, 2, tmp_path)
    assert second is None
    assert first is not None
    assert [node["rank"] for node in first["nodes"]] == [0, 1]
    assert [node["torch"]["threads"] for node in first["nodes"]] == [1, 2]
    assert [node["variables"]["OMP_NUM_THREADS"] for node in first["nodes"]] == ["1", "2"]
    assert (first["training"]["world_size"], first["training"]["nodes"]) == (2, 2)


class Data(LightningDataModule):
    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found

    def fingerprint(self) -> Any:
        torch.rand(3)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


class Another(LightningDataModule):
    def fingerprint(self, path: str) -> str:
        raise AssertionError("called")


def test_fingerprints(caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: a fingerprint that draws random numbers changes the training; one that fails or has another form ends it;
    an unrelated method of that name is called."""
    before = rng.capture()["torch"]
    with caplog.at_level(logging.WARNING, logger="stabletrain"):
        assert fingerprint_of(Data({"name": "x", "digest": "ab", "more": 1})) == {"name": "x", "digest": "ab"}
        assert fingerprint_of(Another()) is None
        assert fingerprint_of(None) is None
        assert caplog.messages == []
        for wrong in (
            None,
            "ab",
            {"name": "x"},
            {"name": "x", "digest": 3},
            {"name": "", "digest": "a"},
            OSError("no"),
        ):
            assert fingerprint_of(Data(wrong)) is None
    assert len(caplog.messages) == 6
    assert all("Data.fingerprint: expected a dictionary of texts" in each for each in caplog.messages)
    assert torch.equal(rng.capture()["torch"], before)


def test_our_own_data(tmp_path: Path) -> None:
    """Bugs: the shipped text has no digest; the digest depends on the batch size, or not on the text."""
    shipped = fingerprint_of(ShakespeareData(context=16))
    assert shipped is not None
    assert shipped["name"] == "shakespeare"
    assert shipped["digest"].startswith("e1d2e18ac43d")
    assert data_tags({"fingerprint": shipped, "first_batch": None}) == {"data.digest": shipped["digest"]}
    assert data_tags({"fingerprint": None, "first_batch": None}) == {}
    (tmp_path / "mine.txt").write_text("abc\n" * 500)
    mine = fingerprint_of(ShakespeareData(path=str(tmp_path / "mine.txt"), context=16))
    assert mine is not None
    assert (mine["name"], mine["digest"] == shipped["digest"]) == ("mine.txt", False)
    digits = [fingerprint_of(DigitsData(batch_size=size)) for size in (8, 16)]
    assert digits[0] == digits[1]
    assert digits[0] is not None
    assert digits[0]["name"] == "digits"


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_module_that_reads_its_loader_itself() -> None:
    """Bug: ``training_step(dataloader_iter)`` has no first batch, and its loader is read for the record."""

    class Reads(Net):
        def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    recorder = record_on_ranks.RecordStart()
    trainer = fit(Reads(), batches(*[HEALTHY] * 4), recorder)
    assert trainer.global_step == 4
    assert recorder.start is not None
    assert recorder.start.data["first_batch"] is None
    assert len(recorder.start.data["initial_weights"]) == 64


def test_a_script_records_itself(tmp_path: Path, client: Any, uri: str) -> None:
    """Bugs: a script's run has no data and no code; its resume overwrites the record of the first part; the record
    changes the training; a run of somebody else gets files."""
    from stabletrain.tracking import MLflowLogger

    def trained(logger: Any, *callbacks: Any) -> Any:
        trainer = fit(Net(), batches(*[HEALTHY] * 4), *callbacks, logger=logger, default_root_dir=tmp_path)
        return dict(trainer.lightning_module.named_parameters())

    def files(run_id: str, folder: str) -> set[str]:
        return {Path(each.path).name for each in client.list_artifacts(run_id, folder)}

    plain = trained(False, *default_callbacks())
    logger = MLflowLogger(uri)
    recorded = trained(logger, *default_callbacks())
    assert all(torch.equal(plain[key], recorded[key]) for key in plain)
    run_id = logger.run_id
    assert run_id is not None
    complete = {"environment.json", "requirements.txt", "code.json", "git.json", "data.json"}
    assert complete <= files(run_id, "environment")
    tags = client.get_run(run_id).data.tags
    assert tags["data.digest"].startswith("first_batch:")
    assert client.get_run(run_id).inputs.dataset_inputs[0].dataset.digest == tags["data.digest"][12:24]
    code = json.loads(Path(client.download_artifacts(run_id, "environment/code.json")).read_text())
    assert "fits.py" in code["fits"]["files"]
    trained(MLflowLogger(uri, run_id=run_id), *default_callbacks())
    assert client.get_run(run_id).data.tags["stabletrain.resumes"] == "1"
    assert complete <= files(run_id, "resume-1/environment")
    trained(MLflowLogger(uri, run_id=run_id))  # without plugins there is nobody who shows the batch
    assert files(run_id, "resume-2/environment") >= complete - {"data.json"}
