"""A run without a remedy ends with an exception; weights and checkpoints are as they were."""

from pathlib import Path

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, Net, Recorder, RequestHandler, batches, fit, run, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from stabletrain import ClipNorm, Guard, SkipNonFinite, TrainingStopped
from stabletrain.core.events import RequestKind

POISON = batches(*[NAN_LOSS] * 12)


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_nan_from_the_first_step(mode: str) -> None:
    """Bugs: a run that skips for ever; weights or buffers of the last, unwanted step."""
    module = Net("adamw-fused")
    before = {key: value.clone() for key, value in module.state_dict().items()}
    mine = trainer(SkipNonFinite(max_in_a_row=4), Guard(mode=mode))
    with pytest.raises(TrainingStopped, match="4 non-finite steps in a row") as stopped:
        run(mine, module, POISON)
    assert stopped.value.plugin == "skip_nonfinite"
    assert stopped.value.reason in str(stopped.value)
    assert mine.global_step in ((0,) if mode == "exact" else (0, 1))  # in device mode one step is in flight
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_run_that_ends_in_poison_is_stopped_too(mode: str) -> None:
    """Bug: in device mode the last outcome comes after the last hook that could stop the run."""
    items = batches(HEALTHY, HEALTHY, NAN_LOSS, NAN_LOSS)
    with pytest.raises(TrainingStopped):
        fit(Net("adamw-fused"), items, SkipNonFinite(max_in_a_row=2), Guard(mode=mode))


def test_checkpoints_are_unchanged(tmp_path: Path) -> None:
    """Bug: the last good checkpoint overwritten by the one of a run that was given up."""
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True, enable_version_counter=False)
    items = batches(HEALTHY, HEALTHY, HEALTHY, *[NAN_LOSS] * 5)
    with pytest.raises(TrainingStopped):
        fit(Net("adamw-loop"), items, SkipNonFinite(max_in_a_row=3), keep, enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert saved["callbacks"]["skip_nonfinite"]["counters"]["attempted"] == 3


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_run_that_skips_for_ever_ends(mode: str) -> None:
    """Bug: an every-other-step NaN never reaches max_in_a_row; more than half of the steps lost ends the run."""
    two_of_three = batches(*[HEALTHY, NAN_LOSS, NAN_LOSS] * 20)
    mine = trainer(Recorder(), SkipNonFinite(), Guard(mode=mode), max_steps=10, max_epochs=-1)
    with pytest.raises(TrainingStopped, match="20 steps attempted, 7 applied"):
        run(mine, Net("adamw-fused"), two_of_three)


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("first", [HEALTHY, NAN_LOSS])
def test_half_of_the_steps_lost_is_bearable(first: int, mode: str) -> None:
    """Bug: a run stopped for its number of attempts at the very step that completes it."""
    items = batches(*[first, NAN_LOSS if first == HEALTHY else HEALTHY] * 20)
    mine = fit(Net("adamw-fused"), items, SkipNonFinite(), Guard(mode=mode), max_steps=10, max_epochs=-1)
    assert mine.global_step == 10


def test_max_attempts_is_exact() -> None:
    """Bug: one attempt more than asked for."""
    recorder = Recorder()
    with pytest.raises(TrainingStopped, match=r"Guard\(max_attempts="):
        fit(Net(), batches(*[HEALTHY] * 9), recorder, Guard(max_attempts=5))
    assert len(recorder.state) == 5


def test_a_callback_that_can_roll_back_takes_the_request_over() -> None:
    """Bug: a stop although a callback handles rollbacks; or the request is repeated at every later step."""
    handler = RequestHandler(RequestKind.ROLLBACK)
    fit(Net(), batches(HEALTHY, NAN_LOSS, NAN_LOSS, HEALTHY), SkipNonFinite(max_in_a_row=2), ClipNorm(), handler)
    assert [(r.kind, r.plugin) for r in handler.got] == [(RequestKind.ROLLBACK, "skip_nonfinite")]
