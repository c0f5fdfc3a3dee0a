"""A non-finite step that nobody drops is said once, with what to do about it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fits import HEALTHY, INF_GRAD, NAN_GRAD, NAN_LOSS, EventRecorder, Net, batches, fit
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

from stabletrain import ClipNorm, ClipZScore, DetectSpikes, Guard, MonitorGradients, Rollback, SkipNonFinite

FAULTS = [NAN_LOSS, NAN_GRAD, INF_GRAD]
WATCHERS: dict[str, Callable[[], Callback]] = {
    "a detector": DetectSpikes,
    "a clipper": ClipZScore,
    "a fixed clipper": ClipNorm,
    "a monitor": MonitorGradients,
    "the guard alone": Guard,
}


def events(*callbacks: Callback, fault: int, mode: Any = "exact", steps: int = 60) -> list[Any]:
    listener = EventRecorder()
    items = batches(HEALTHY, HEALTHY, *[fault] * steps)
    others = [] if any(isinstance(each, Guard) for each in callbacks) else [Guard(mode=mode)]
    fit(Net("adamw-fused", norm=False), items, *callbacks, *others, listener)
    return [each for each in listener.events if each.kind == "nonfinite"]


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", WATCHERS)
def test_a_plugin_that_only_watches_says_one_event(name: str, fault: int, mode: str) -> None:
    """Bugs: 60 steps of NaN are applied without a word, or with a line for each; no word of what to add."""
    found = events(WATCHERS[name](), fault=fault, mode=mode)
    (event,) = [each for each in found if each.plugin == "guard"]
    assert event.step == 2
    assert not math.isfinite(event.value)
    assert "was applied, because no plugin drops non-finite steps" in event.reason
    assert 'default_callbacks(nonfinite="skip")' in event.reason
    # the monitor names the parameters, once
    assert [(each.plugin, each.step) for each in found if each.plugin != "guard"] == (
        [("monitor_gradients", 2)] if name == "a monitor" and mode == "exact" else []
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_a_dropped_step_is_left_to_the_plugin_that_drops_it(fault: int) -> None:
    """Bug: a warning that NaN is applied, in a run where it is not."""
    found = events(ClipZScore(), SkipNonFinite(), fault=fault, steps=3)
    assert [each.plugin for each in found] == ["skip_nonfinite"] * 3


def test_it_is_said_again_in_the_next_fit() -> None:
    """Bug: the second run of a script is not warned, because the first one was."""
    detector = ClipNorm()
    for _ in range(2):
        assert [each.plugin for each in events(detector, fault=NAN_LOSS, steps=4)] == ["guard"]


def test_a_rollback_without_a_skip_is_still_requested(tmp_path: Path) -> None:
    """Bug: with one event instead of many, the request for a rollback is gone, too."""
    listener = EventRecorder()
    items = batches(*[HEALTHY] * 12, *[NAN_LOSS], *[HEALTHY] * 12)
    rollback = Rollback(every=4, trust_after=2, check_every=1, rewarm=0)
    fit(Net(norm=False), items, rollback, listener, default_root_dir=tmp_path)
    assert [each.kind for each in listener.events if each.kind != "spike"] == ["nonfinite", "rollback"]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", WATCHERS)
def test_early_stopping_stops_at_the_next_point(name: str, fault: int) -> None:
    """Bug: ``loss`` and ``grad_norm`` stay at their last finite means for 80 steps of NaN, and nothing stops."""
    stop = EarlyStopping("loss" if fault == NAN_LOSS else "grad_norm", patience=99, check_on_train_epoch_end=True)
    items = batches(*[HEALTHY] * 6, fault, HEALTHY)
    mine = fit(Net("adamw-foreach", norm=False), items, WATCHERS[name](), stop, max_epochs=5, log_every_n_steps=2)
    assert mine.current_epoch < 5
    assert mine.global_step == 8
