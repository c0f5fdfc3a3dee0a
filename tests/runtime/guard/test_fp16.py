"""fp16: a bad batch is dropped at the scale that it was met at, and a real overflow lowers the scale."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import (
    HEALTHY,
    INF_GRAD,
    NAN_GRAD,
    NAN_LOSS,
    EventRecorder,
    Net,
    Recorder,
    SaveAfter,
    assert_same,
    batches,
    everything,
    fit,
    loader,
    scaler,
)
from torch import Tensor

from stabletrain import ClipNorm, SkipNonFinite

HOUR = {"init_scale": 65536.0, "growth_interval": 2000}


def every_fifth(fault: int, steps: int) -> list[Any]:
    return batches(*(fault if i % 5 == 4 else HEALTHY for i in range(steps)))


@pytest.mark.parametrize("fault", [NAN_GRAD, INF_GRAD])
def test_a_bad_gradient_in_every_fifth_batch(fault: int) -> None:
    """Bug: the scale is halved for each of them, gradients underflow, and the run ends at a scale of 3e-39."""
    items, results = every_fifth(fault, 150), []
    for options in ({"plugins": [scaler(**HOUR)]}, {}):
        recorder, skip = Recorder(), SkipNonFinite()
        module = Net("adamw-loop", norm=False)
        fit(module, items, recorder, skip, **options)
        results.append(recorder.state)
    half, full = results
    assert len(half) == len(full) == 150
    assert half[-1].loss_scale >= 128.0  # 4 steps at each scale: ten at 8 times this one take a few backoffs
    assert sum(o.overflow for o in half) <= 9
    assert all(o.skipped == (o.step % 5 == 4) for o in half[60:])
    ends = [sum(o.loss for o in each[-40:]) for each in results]
    assert ends[0] == pytest.approx(ends[1], rel=0.1)


def test_the_scale_is_held_and_the_step_counted_as_nonfinite() -> None:
    """Bugs: the scale backs off for a bad batch; the event says overflow; the step counts towards growth."""
    items = batches(*[HEALTHY] * 10, *[NAN_GRAD, HEALTHY] * 3, NAN_GRAD, HEALTHY)
    recorder, skip, listener = Recorder(), SkipNonFinite(), EventRecorder()
    trained = fit(
        Net("adamw-loop"), items, recorder, skip, listener, plugins=[scaler(init_scale=4096.0, growth_interval=10**6)]
    )
    seen = [(o.loss_scale, o.skipped, o.overflow) for o in recorder.state if not math.isfinite(o.grad_norm)]
    assert seen == [(4096.0, False, True), (2048.0, False, True), (1024.0, False, True), (512.0, True, False)]
    assert recorder.state[-1].loss_scale == 512.0
    assert [(e.step, e.kind) for e in listener.events if e.plugin == "skip_nonfinite"] == [(16, "nonfinite")]
    assert trained.global_step == 14
    assert trained.callback_metrics["stability/skipped"] == 1


def test_at_a_scale_of_one_the_batch_is_to_blame() -> None:
    """Bug: a scale far below 1, at which every gradient is zero."""
    recorder = Recorder()
    plugins = [scaler(init_scale=1.0, growth_interval=10**6)]
    fit(Net("adamw-loop"), batches(*[HEALTHY, NAN_GRAD, INF_GRAD] * 2), recorder, SkipNonFinite(), plugins=plugins)
    assert {o.loss_scale for o in recorder.state} == {1.0}
    assert [o.skipped for o in recorder.state] == [False, True, True] * 2


@pytest.mark.parametrize("fault", [NAN_GRAD, INF_GRAD, NAN_LOSS])
@pytest.mark.parametrize("init_scale", [1.0, 4096.0])
def test_without_a_plugin_that_skips_a_bad_batch_is_not_applied(fault: int, init_scale: float) -> None:
    """Bug: NaN in the weights because the guard took the step out of the loss scaler's hands."""
    items = batches(*[HEALTHY] * 10, *[fault, HEALTHY] * 5)
    recorder, listener = Recorder(), EventRecorder()
    plugins = [scaler(init_scale=init_scale, growth_interval=10**6)]
    trained = fit(Net("adamw-loop", norm=False), items, recorder, ClipNorm(), listener, plugins=plugins)
    assert all(torch.isfinite(p).all() for p in trained.lightning_module.parameters())
    assert sum(o.overflow for o in recorder.state) == 5
    assert not [e for e in listener.events if e.plugin == "guard"]


class Growing(Net):
    """Its loss and gradients grow by a factor at one batch, for good."""

    def __init__(self, at: int, factor: float) -> None:
        super().__init__("adamw-loop", norm=False)
        self.at, self.factor = at, factor

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        loss = (self.net(x).float() - x.sum(1, keepdim=True)).square().mean()
        return loss * (self.factor if batch_idx >= self.at else 1.0)


def test_a_scale_that_is_too_high_at_the_start_backs_off() -> None:
    """Bug: overflows taken for bad batches: the scale stays too high, and nothing is learned."""
    recorder = Recorder()
    fit(Net("adamw-loop"), batches(*[HEALTHY] * 60), recorder, SkipNonFinite(), plugins=[scaler(init_scale=2.0**40)])
    overflows = [o.overflow for o in recorder.state]
    assert sum(overflows) >= 10
    assert not any(o.skipped for o in recorder.state)
    first = overflows.index(False)
    assert recorder.state[first].loss_scale < 2.0**30


def test_an_overflow_after_each_growth_of_the_scale_backs_off() -> None:
    """Bug: the scale stays at a value that has become too large by growing."""
    recorder, skip = Recorder(), SkipNonFinite()
    plugins = [scaler(init_scale=2.0**12, growth_interval=4)]
    fit(Net("adamw-loop"), batches(*[HEALTHY] * 150), recorder, skip, plugins=plugins)
    overflows = [o.step for o in recorder.state if o.overflow]
    assert len(overflows) >= 5
    assert not any(o.skipped for o in recorder.state)
    for at in overflows[:-1]:
        assert recorder.state[at + 1].loss_scale == recorder.state[at].loss_scale / 2


def test_gradients_that_grow_for_good_lower_the_scale() -> None:
    """Bug: every later step is dropped as a bad batch, because larger scales once went well."""
    recorder, skip = Recorder(), SkipNonFinite(max_in_a_row=3)
    plugins = [scaler(init_scale=2.0**13, growth_interval=10**6)]
    fit(Growing(at=30, factor=2.0**12), batches(*[HEALTHY] * 80), recorder, skip, plugins=plugins)
    lost = [o for o in recorder.state if not o.applied]
    assert 3 <= len(lost) <= 15
    assert not any(o.skipped for o in lost)


@pytest.mark.parametrize("at", range(8, 19))
def test_resumed_equals_uninterrupted(at: int, tmp_path: Path) -> None:
    """Bug: the scales that went well are forgotten, so that a resumed run takes a bad batch for an overflow."""
    items = batches(*[HEALTHY] * 10, *[NAN_GRAD, HEALTHY] * 5)
    whole, path = [Recorder(), SkipNonFinite()], tmp_path / "at.ckpt"
    plugins = [scaler(init_scale=4096.0, growth_interval=7)]
    expected = fit(Net("adamw-loop"), items, *whole, SaveAfter(at, path), plugins=plugins)
    assert any(o.skipped for o in whole[0].state)
    assert any(o.overflow for o in whole[0].state)
    resumed = [Recorder(), SkipNonFinite()]
    rest = loader(items[at + 1 :], sized=False)
    again = fit(Net("adamw-loop"), rest, *resumed, ckpt_path=path, plugins=[scaler(growth_interval=7)])
    assert_same(everything(again), everything(expected))
    for mine, theirs in zip(resumed, whole, strict=True):
        assert repr(mine.state_dict()) == repr(theirs.state_dict())
