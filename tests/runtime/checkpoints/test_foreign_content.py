"""Checkpoints that somebody else made: damaged, or changed and sealed with right checksums."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_suite import checkpoints
from hostile_suite.reseal import STRUCTURAL, reseal
from lightning.pytorch.trainer.states import TrainerFn

from stabletrain import SaveCheckpoints
from stabletrain.runtime.checkpoints import CheckpointError, CheckpointInfo, Saver, Store, fields, load, verify
from stabletrain.runtime.checkpoints.content import check_content, report_conversions
from stabletrain.runtime.checkpoints.decoding import decode, tensor_kinds
from stabletrain.runtime.checkpoints.lightning_io import check_when_reading
from stabletrain.testing.toy import ToyBatches, ToyModule
from stabletrain.testing.trainer import quiet_trainer

from .conftest import Write


def test_a_sample_of_damaged_and_of_resealed_checkpoints(tmp_path: Path) -> None:
    """Bug: an exception other than the one that makes the previous checkpoint be tried, a hang, or no word."""
    tried = [*checkpoints.damaged(tmp_path / "a", 3, 15), *checkpoints.resealed(tmp_path / "b", 3, 40)]
    assert [each for each in tried if not each.held] == []


@pytest.mark.slow
def test_many_damaged_and_resealed_checkpoints(tmp_path: Path) -> None:
    """Bug: as above, at a place or with a value that the sample leaves out."""
    tried = [*checkpoints.damaged(tmp_path / "a", 0, 400), *checkpoints.resealed(tmp_path / "b", 0, 200)]
    assert [each for each in tried if not each.held] == []


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"T": 1},
        {"T": -1},
        {"T": True},
        {"N": "0"},
        {"T": 0, "N": 0},
        {"t": {}},
        {"d": [["a"]]},
        {"d": [[[1], 2]]},
        {"d": [["a", 1], ["a", 2]]},
        {"o": [], "m": {"d": [["net", 3]]}},
        {"o": [], "m": {"d": [["net", {"d": [["version", "2"]]}]]}},
        {"s": [{"d": []}]},
        {"q": [[1, 2], 1]},
        {"q": [3, None]},
        {"f": "high"},
        {"c": ["1", "2", "3"]},
        {"b": "%"},
        {"path": "a\0b"},
        {"device": "nowhere"},
        {"dtype": "float33"},
        {"size": [1.5]},
        {"W": []},
        {"W": {"class": 3}},
        {"unknown": 1},
        float("inf"),
    ],
)
def test_a_value_that_does_not_fit_its_tag(tree: Any) -> None:
    """Bug: KeyError, TypeError or StopIteration from within the reader; a negative index reads another tensor."""
    with pytest.raises(CheckpointError):
        decode({"d": [["x", [tree]]]}, [torch.ones(2)])


@pytest.mark.parametrize(
    "index",
    [
        None,
        [None],
        [["a", "float32"]],
        [[3, "float32", []]],
        [["a", "load", []]],
        [["a", None, []]],
        [["a", "qint8", [2]]],
        [["a", "float32", [-1]]],
        [["a", "float32", [True]]],
        [["a", "float32", [1] * 65]],
        [["a", "float32", []], ["a", "float32", []]],
    ],
)
def test_a_list_of_tensors_that_cannot_be(index: Any) -> None:
    """Bug: an exception of torch's, or memory for a shape that nobody wrote."""
    with pytest.raises(CheckpointError):
        tensor_kinds(index)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


def test_nesting_that_is_written_is_read_too(tmp_path: Path) -> None:
    """Bug: a checkpoint is written that cannot be read again, or a deep one ends in a RecursionError."""
    saver = Saver(Store(tmp_path))
    saver.save({"x": nested(60)}, CheckpointInfo(step=1, run="a"), wait=True)
    assert load(tmp_path)["x"] == nested(60)
    with pytest.raises(CheckpointError, match=r"x holds a container .* deeper than"):
        saver.save({"x": nested(70)}, CheckpointInfo(step=1, run="a"), wait=True)
    with pytest.raises(CheckpointError, match="nested deeper"):
        decode({"d": [["x", nested(200)]]}, [])


def test_more_values_than_are_read_are_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a long list of small numbers is written, and cannot be read again."""
    monkeypatch.setattr(fields, "VALUES_LIMIT", 100)
    Saver(Store(tmp_path)).save({"x": [0] * 200}, CheckpointInfo(step=1, run="a"), wait=True)
    assert "more than 100 values besides tensors" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_what_healthy_runs_save_is_read(runs: Path) -> None:
    """Bug: the state of Adafactor, a metric's list in the weights, or a file with weights only to test is refused."""
    trainer = quiet_trainer(default_root_dir=runs)
    trainer.strategy.connect(ToyModule())
    checkpoint = load(runs)
    groups = [{"params": [0, 1], "lr": None, "eps": (1e-30, 1e-3), "beta1": None}]  # of transformers' Adafactor
    vector, matrix = {"step": 1, "exp_avg_sq": torch.ones(2)}, {"step": 1, "exp_avg_sq_row": torch.ones(2)}
    checkpoint["optimizer_states"] = [{"state": {0: vector, 1: matrix}, "param_groups": groups}]
    checkpoint["state_dict"]["metric.values"] = [torch.ones(2), torch.ones(3)]
    trainer.state.fn = TrainerFn.FITTING
    check_content(checkpoint, trainer)
    report_conversions(checkpoint, ToyModule())
    trainer.state.fn = TrainerFn.TESTING
    check_content({key: checkpoint[key] for key in ("state_dict", "pytorch-lightning_version")}, trainer)


def test_links_are_followed_only_where_the_user_gave_them(write: Write, tmp_path: Path) -> None:
    """Bug: ``resume=LINK`` is refused; or a link within a folder of checkpoints leads elsewhere."""
    path = write(1)
    (tmp_path / "mine").symlink_to(path)
    (tmp_path / "store").symlink_to(tmp_path)
    assert load(tmp_path / "mine")["step"] == load(tmp_path / "store")["step"] == 1
    verify(tmp_path / "mine")
    other = tmp_path / "other"
    other.mkdir()
    (other / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        load(other)


def test_more_memory_than_there_is(write: Write) -> None:
    """Bug: a sparse file, which costs its author nothing, makes the system end the process."""
    path = write(1)
    next(change for change in STRUCTURAL if change.name == "a file of 4 TB with a tensor").apply(path)
    with pytest.raises(CheckpointError, match=r"holds tensors of 4398\.0 GB, and .* GB of memory are free"):
        load(path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Checkpoints of a run, of steps 2 and 4."""
    saver = SaveCheckpoints(folder=tmp_path / "run", every=2, keep_last=None)
    quiet_trainer(saver, max_steps=4, default_root_dir=tmp_path).fit(ToyModule(), ToyBatches())
    return tmp_path / "run"


def resumed(folder: Path) -> int:
    trainer = quiet_trainer(max_steps=6, default_root_dir=folder.parent)
    check_when_reading(trainer)
    trainer.fit(ToyModule(), ToyBatches(), ckpt_path=str(folder))
    return trainer.global_step


def edit(folder: Path, old: str, new: str) -> None:
    state = folder / "state.json"
    text = state.read_text()
    assert old in text
    state.write_text(text.replace(old, new))
    reseal(folder)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint", "ignore:Be aware that when using")
@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ('["global_step", 4]', '["global_step", "4"]', "global_step must be a count >= 0, got"),
        ('["pytorch-lightning_version"', '["version"', "pytorch-lightning_version must be a version"),
        ('["completed", 4]', '["completed", -4]', "must be a count >= 0, got -4"),
        ('["completed", 4]', '["reset", 4]', "completed must be there"),
        ('["optimizer_states", [', '["optimizers", [', "holds the weights only"),
        ('["lr", 0.001]', '["lr", {"f": "nan"}]', r"optimizer_states\.0\.param_groups\.0\.lr must be a number"),
        ('["fit_loop"', '["fitting"', "fit_loop must be a dict"),
    ],
)
def test_content_is_checked_before_anything_is_restored(
    runs: Path, caplog: pytest.LogCaptureFixture, old: str, new: str, problem: str
) -> None:
    """Bug: Lightning restores a part, and then fails; the previous good checkpoint is not tried."""
    edit(runs / "step-00000004", old, new)
    assert resumed(runs) == 6
    assert "step-00000004 is damaged: " in caplog.text
    shutil.rmtree(runs / "step-00000002")
    with pytest.raises(CheckpointError, match=rf"{problem}.*config key resume"):
        resumed(runs)


def test_a_conversion_of_the_weights_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: a resumed run trains in another precision than the one that was saved, without a word."""
    checkpoint = {"state_dict": ToyModule().state_dict()}
    report_conversions(checkpoint, ToyModule())
    assert caplog.text == ""
    report_conversions(checkpoint, ToyModule().double())
    assert "converted from float32 to float64" in caplog.text


@pytest.mark.slow
def test_a_run_killed_at_every_file_event_resumes_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a moment of a save after which the run does not resume, resumes with other weights, or from too far back."""
    from hostile_suite import boundaries

    points = boundaries.run("SaveCheckpoints", tmp_path)
    with capsys.disabled():
        print(f"\nckpt-chaos: {boundaries.summary(points)}")
    assert len(points) > 40
    assert [point for point in points if point.verdict != "PASS"] == []
