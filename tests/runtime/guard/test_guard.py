"""A guard that never triggers changes nothing; gradients are clipped once; overflows are left to the scaler."""

import itertools
import math
from typing import Any

import pytest
import torch
from fits import (
    FUSED,
    HEALTHY,
    INF_GRAD,
    LARGE_GRAD,
    NAN_LOSS,
    OPTIMIZERS,
    Net,
    Recorder,
    ShyRecorder,
    SkipHighLoss,
    assert_same,
    batches,
    everything,
    fit,
    scaler,
)
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode

from stabletrain import ClipNorm, Guard, SkipNonFinite, TrainingStopped

HEALTHY_RUN = batches(*[HEALTHY] * 8)
SPIKY = batches(*[LARGE_GRAD if i in (2, 3, 6) else HEALTHY for i in range(8)])


def idle(mode: str = "auto") -> list[Any]:
    return [ClipNorm(max_norm=1e6), SkipNonFinite(), SkipHighLoss(), Recorder(), Guard(mode=mode)]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_idle_guard_changes_nothing(optimizer: str, fp16: bool, accumulate: int) -> None:
    """Bugs: a gradient multiplied by 1 - epsilon; random numbers drawn; buffers put back that should stay."""
    results = []
    for callbacks in ([], idle()):
        module = Net(optimizer, "step", dropout=0.3)
        options: dict[str, Any] = {"fp16": fp16, "accumulate_grad_batches": accumulate}
        results.append(everything(fit(module, HEALTHY_RUN, *callbacks, **options)))
    assert_same(*results)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("optimizer", FUSED)
def test_an_idle_guard_in_device_mode_changes_nothing(optimizer: str, accumulate: int) -> None:
    """Bug: a division by grad_scale = 1 that is not exact, or a kernel that takes another path with found_inf."""
    results = []
    for callbacks in ([], idle("device")):
        module = Net(optimizer, dropout=0.3)
        results.append(everything(fit(module, HEALTHY_RUN, *callbacks, accumulate_grad_batches=accumulate)))
    assert_same(*results)


def outcomes(optimizer: str, *callbacks: Any, items: Any = SPIKY, **options: Any) -> tuple[dict[str, Any], Any]:
    recorder = Recorder()
    # no normalisation: a bias before it has a gradient of rounding errors, which Adam makes as large as any
    weights = everything(fit(Net(optimizer, norm=False), items, *callbacks, recorder, **options))
    return weights, recorder.state


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_clipping_is_torchs(optimizer: str) -> None:
    """Bug: a coefficient off by more than torch's own 1e-6; small gradients raised to the maximum."""
    mine, _ = outcomes(optimizer, ClipNorm(max_norm=1.0))
    theirs = everything(fit(Net(optimizer, norm=False), SPIKY, gradient_clip_val=1.0))
    for key, value in theirs.items():
        if value.is_floating_point():
            torch.testing.assert_close(mine[key], value, rtol=2e-5, atol=2e-6, msg=key)


@pytest.mark.parametrize("optimizer", FUSED)
def test_both_modes_clip_alike(optimizer: str) -> None:
    """Bug: a device path that clips by another norm, or clips twice."""
    exact, seen_exactly = outcomes(optimizer, ClipNorm(max_norm=1.0))
    device, seen_on_device = outcomes(optimizer, ClipNorm(max_norm=1.0), Guard(mode="device"))
    for key, value in exact.items():
        torch.testing.assert_close(device[key], value, rtol=1e-6, atol=1e-6, msg=key)
    assert [o.clipped for o in seen_exactly] == [o.clipped for o in seen_on_device]
    assert any(o.clipped for o in seen_exactly)
    assert [o.step for o in seen_on_device] == list(range(8))


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_rules_see_the_raw_norm_and_the_tightest_bound_wins(mode: str) -> None:
    """Bugs: a second bound that sees what the first one left; the last bound in the list instead of the minimum."""
    clips = [ClipNorm(max_norm=2.0, name="loose"), ClipNorm(max_norm=0.5, name="tight")]
    _, bare = outcomes("adamw-fused", items=SPIKY[:1])
    _, seen = outcomes("adamw-fused", *clips, Guard(mode=mode))
    assert seen[0].grad_norm == bare[0].grad_norm == seen[0].transformed_norm
    assert all(o.grad_norm > 100 for o in seen if o.step in (2, 3, 6))
    assert all(o.applied_norm == min(o.grad_norm, 0.5) for o in seen)


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_the_order_of_the_list_does_not_matter(mode: str) -> None:
    """Bug: plugins that act one after the other."""
    items = SPIKY + batches(NAN_LOSS, HEALTHY, seed=50)
    results = []
    for order in itertools.permutations([0, 1, 2]):
        members = [ClipNorm(max_norm=2.0, name="loose"), ClipNorm(max_norm=0.5, name="tight"), SkipNonFinite()]
        results.append(everything(fit(Net("adamw-fused"), items, *(members[i] for i in order), Guard(mode=mode))))
    for result in results[1:]:
        assert_same(results[0], result)


@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_loss_is_the_windows_mean(fp16: bool, accumulate: int) -> None:
    """Bugs: the loss divided by the window or multiplied by the scale; a shorter last window; one micro-batch only."""
    losses: list[float] = []

    class Listening(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            losses.append(loss.item())
            return loss

    recorder = Recorder()
    fit(Listening("adamw-loop"), HEALTHY_RUN, recorder, accumulate_grad_batches=accumulate, fp16=fp16)
    windows = [losses[i : i + accumulate] for i in range(0, 8, accumulate)]
    expected = [sum(window) / len(window) for window in windows]
    assert [o.loss for o in recorder.state] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_overflow_is_left_to_the_scaler(optimizer: str) -> None:
    """Bugs: a schedule that goes on, a global step that counts, rules fed with it, a scale that does not back off."""
    items = batches(HEALTHY, HEALTHY, INF_GRAD, HEALTHY, HEALTHY)
    everyone, shy, guard, skip = Recorder(), ShyRecorder(), Guard(), SkipNonFinite(max_in_a_row=1)
    trained = fit(Net(optimizer, "step"), items, everyone, shy, guard, skip, fp16=True)
    assert trained.global_step == 4
    assert trained.lr_scheduler_configs[0].scheduler.last_epoch == 4
    assert [o.overflow for o in everyone.state] == [False, False, True, False, False]
    assert [o.step for o in shy.state] == [0, 1, 3, 4]
    assert [o.loss_scale for o in everyone.state] == [1024.0, 1024.0, 1024.0, 512.0, 512.0]
    assert [o.overflows_in_a_row for o in everyone.state] == [0, 0, 1, 0, 0]
    counters = guard.state_dict()["counters"]
    assert (counters["attempted"], counters["overflows"], counters["skipped"]) == (5, 1, 0)


def test_overflows_that_do_not_end_become_events() -> None:
    """Bug: the scale falls for ever without an event."""
    items = batches(HEALTHY, INF_GRAD, INF_GRAD, INF_GRAD, HEALTHY)
    skip, leader = SkipNonFinite(max_overflows_in_a_row=2, max_in_a_row=9), Guard()
    fit(Net("sgd-momentum"), items, leader, skip, fp16=True)
    events = list(leader._guard.events.recent)  # type: ignore[union-attr]
    assert [(e.step, e.kind, e.value) for e in events] == [(2, "overflow", 2.0), (3, "overflow", 3.0)]
    leader = Guard()
    plugins = [scaler(init_scale=4.0)]
    fit(Net("sgd-momentum"), items, leader, SkipNonFinite(min_scale=2.0), plugins=plugins)
    assert [e.step for e in leader._guard.events.recent] == [2, 3]  # type: ignore[union-attr]
    with pytest.raises(TrainingStopped, match="overflow"):
        fit(Net("sgd-momentum"), items, SkipNonFinite(max_overflows_in_a_row=1, max_in_a_row=2), fp16=True)


@pytest.mark.parametrize("optimizer", FUSED)
def test_norms_of_a_fused_optimizer_are_unscaled(optimizer: str) -> None:
    """Bug: Lightning leaves unscaling to the kernel: norms and bounds times the loss scale."""
    other = "sgd-momentum" if "sgd" in optimizer else "adamw-loop"
    fused, unfused = (outcomes(name, ClipNorm(), items=HEALTHY_RUN, fp16=True)[1] for name in (optimizer, other))
    assert [o.grad_norm for o in fused] == pytest.approx([o.grad_norm for o in unfused], rel=1e-3)


class CountReads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += "local_scalar_dense" in str(func) or "is_nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_device_mode_never_reads_from_the_device() -> None:
    """Bug: an .item(), a Python `if` on a tensor, or a metric that makes the host wait at every step."""
    counts = []
    for callbacks in ([], [ClipNorm(max_norm=1.0), SkipNonFinite(), Guard(mode="device")]):
        with CountReads() as mode:
            fit(Net("adamw-fused"), HEALTHY_RUN, *callbacks, log_every_n_steps=1000)
        counts.append(mode.reads)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_loss_of_one_element(mode: str, shape: tuple[int, ...]) -> None:
    """Bug: a loss of shape (1,), which autograd accepts, breaks the guard."""

    class Shaped(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx).reshape(shape)

    recorder = Recorder()
    trained = fit(Shaped("adamw-fused"), HEALTHY_RUN, recorder, Guard(mode=mode), accumulate_grad_batches=2)
    assert trained.global_step == 4
    assert all(math.isfinite(o.loss) for o in recorder.state)


def test_a_training_step_that_returns_none() -> None:
    """Bug: a batch that the module itself skips counts as a step."""

    class Choosy(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == 2 else super().training_step(batch, batch_idx)

    recorder = Recorder()
    results = [everything(fit(Choosy("adamw-loop"), HEALTHY_RUN, *callbacks)) for callbacks in ([], [recorder])]
    assert_same(*results)
    assert len(recorder.state) == 7


def test_metrics_of_the_last_batch_are_there_when_it_ends() -> None:
    """Bug: a callback that saves at the last batch finds the metrics of an earlier flush."""
    seen: list[float] = []

    class Last(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append(float(trainer.callback_metrics.get("stability/grad_norm", math.nan)))

    recorder = Recorder()
    fit(Net(), HEALTHY_RUN, recorder, Last(), log_every_n_steps=5)
    norms = [o.grad_norm for o in recorder.state]
    assert seen[4:7] == pytest.approx([sum(norms[:5]) / 5] * 3)
    assert seen[7] == pytest.approx(sum(norms[5:]) / 3)
