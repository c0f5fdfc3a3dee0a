"""A resumed run equals an uninterrupted one, and a checkpoint that lacks state gives a warning."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    HEALTHY,
    LARGE_GRAD,
    NAN_LOSS,
    Net,
    Recorder,
    SaveAfter,
    SkipHighLoss,
    assert_same,
    batches,
    everything,
    fit,
    loader,
)
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from stabletrain import ClipNorm, Guard, SkipNonFinite, SkipOutliers

ITEMS = batches(HEALTHY, LARGE_GRAD, NAN_LOSS, HEALTHY, NAN_LOSS, HEALTHY, HEALTHY, LARGE_GRAD)


def members(mode: str) -> list[Any]:
    return [Recorder(), SkipNonFinite(), ClipNorm(max_norm=1.0), SkipHighLoss(), Guard(mode=mode)]


@pytest.mark.parametrize("at", range(8))
@pytest.mark.parametrize("mode", ["exact", "device"])
def test_resumed_equals_uninterrupted(mode: str, at: int, tmp_path: Path) -> None:
    """Bugs: an outcome in flight that is lost; a skip in flight with its global step counted; counters that restart."""
    whole = members(mode)
    path = tmp_path / "at.ckpt"
    expected = fit(Net("adamw-fused"), ITEMS, *whole, SaveAfter(at, path))
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == sum(fault != NAN_LOSS for _, fault in ITEMS[: at + 1])
    if at == 7:
        return
    resumed = members(mode)
    # the position in the data is the checkpoint's, so the loader begins at the first batch that is left
    from_there = fit(Net("adamw-fused"), loader(ITEMS[at + 1 :], sized=False), *resumed, ckpt_path=path)
    assert_same(everything(from_there), everything(expected))
    assert repr(resumed[0].state) == repr(whole[0].state)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert repr(mine.state_dict()) == repr(theirs.state_dict())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("fp16", [False, True])
def test_a_checkpoint_right_after_a_skip(fp16: bool, first: bool, tmp_path: Path) -> None:
    """Bug: saved by a callback before ours in the list, with a loss scale that is about to be put back."""
    path = tmp_path / "at.ckpt"
    plugins: list[Any] = [SkipNonFinite()]
    save = SaveAfter(2, path)
    mode: Any = [save, *plugins] if first else [*plugins, save]
    fit(Net("adamw-loop"), batches(HEALTHY, HEALTHY, NAN_LOSS, HEALTHY), *mode, fp16=fp16)
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 2
    assert saved["callbacks"]["skip_nonfinite"]["state"] == {"in_a_row": 1}
    if fp16:
        assert saved["MixedPrecision"]["scale"] == 1024.0
        assert saved["MixedPrecision"]["_growth_tracker"] == 2


def checkpoint(folder: Path, *callbacks: Callback) -> Path:
    path = folder / "some.ckpt"
    fit(Net("adamw-loop"), ITEMS, *callbacks).save_checkpoint(path)
    return path


def test_a_checkpoint_saved_after_the_fit_has_everything(tmp_path: Path) -> None:
    """Bug: history thrown away with the hooks: `trainer.save_checkpoint` after `fit` is common."""
    saved = torch.load(checkpoint(tmp_path, *members("exact")), weights_only=True)
    assert saved["callbacks"]["recorder"]["counters"]["attempted"] == 8
    assert len(saved["callbacks"]["recorder"]["state"]) == 8


def test_a_checkpoint_without_our_state_warns(tmp_path: Path) -> None:
    """Bug: a baseline starts empty without a warning, or the run cannot be resumed."""
    path = checkpoint(tmp_path)
    with pytest.warns(UserWarning, match="no state of clip_norm: its history starts empty"):
        fit(Net("adamw-loop"), ITEMS, ClipNorm(), ckpt_path=path, max_epochs=2)


def test_state_of_another_version_warns(tmp_path: Path) -> None:
    """Bug: an old checkpoint that cannot be resumed because a baseline has one field more today."""
    path = checkpoint(tmp_path, SkipNonFinite(), SkipOutliers())
    saved = torch.load(path, weights_only=True)
    saved["callbacks"]["skip_outliers"]["state"].pop("norm")
    torch.save(saved, path)
    again = SkipOutliers()
    with pytest.warns(UserWarning, match="skip_outliers: the checkpoint was written by another version"):
        fit(Net("adamw-loop"), ITEMS, SkipNonFinite(), again, ckpt_path=path, max_epochs=2)
    assert len(again.state.loss.past.window) == 6, "of the second epoch, which has two NaN"


def test_other_arguments_warn(tmp_path: Path) -> None:
    """Bug: a changed hyper-parameter that nobody notices."""
    path = checkpoint(tmp_path, ClipNorm(max_norm=1.0))
    with pytest.warns(UserWarning, match=r"clip_norm: .* other arguments: max_norm=2\.0 \(was 1\.0\)"):
        fit(Net("adamw-loop"), ITEMS, ClipNorm(max_norm=2.0), ckpt_path=path, max_epochs=2)


def test_callbacks_can_be_copied_and_pickled_at_any_time() -> None:
    """Bug: a running guard dragged along: the trainer, its loaders and hooks that point into another fit."""

    class Copying(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            for callback in trainer.callbacks:
                if isinstance(callback, ClipNorm | SkipNonFinite | Guard):
                    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback)), copy.copy(callback)):
                        assert type(twin) is type(callback)
                        assert twin._guard is None
                        assert not {"log", "log_dict"} & vars(twin).keys()  # the module's, put there by Lightning
                        assert callable(twin.on_train_batch_start)
                        assert getattr(twin, "state", None) == getattr(callback, "state", None)

    callbacks = [ClipNorm(max_norm=3.0), SkipNonFinite(max_in_a_row=4), Guard()]
    fit(Net("adamw-loop"), ITEMS, *callbacks, Copying())
    twin = pickle.loads(pickle.dumps(callbacks[0]))
    assert twin.max_norm == 3.0
    fit(Net("adamw-loop"), ITEMS, twin, copy.deepcopy(callbacks[1]))


def test_model_checkpoint_can_monitor_and_resume(tmp_path: Path) -> None:
    """Bug: `monitor="grad_norm"` of a metric that is not there when the checkpoint is made."""
    keep = ModelCheckpoint(tmp_path, monitor="grad_norm", every_n_train_steps=2, save_top_k=-1)
    fit(Net("adamw-fused"), ITEMS, ClipNorm(), SkipNonFinite(), keep, enable_checkpointing=True)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
