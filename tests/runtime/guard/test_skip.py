"""A skipped step is a batch never seen: equal bit for bit to runs over the other batches, without any plugin."""

import sys
from typing import Any

import pytest
import torch
from fits import (
    FUSED,
    HEALTHY,
    HIGH_LOSS,
    INF_GRAD,
    LOST,
    NAN_GRAD,
    NAN_LOSS,
    OPTIMIZERS,
    Net,
    SkipHighLoss,
    assert_same,
    batches,
    everything,
    fit,
    loader,
    scaler,
)
from torch import Tensor, nn

from stabletrain import Guard, SkipNonFinite
from stabletrain.runtime.guard.module_buffers import ModuleBuffers


def with_fault(fault: int, at: int = 3, n: int = 8) -> list[tuple[Tensor, int]]:
    return batches(*[fault if i == at else HEALTHY for i in range(n)])


def skips(mode: str = "exact") -> list[object]:
    return [SkipNonFinite(), SkipHighLoss(), Guard(mode=mode)]


def never_seen(items: list[tuple[Tensor, int]]) -> list[tuple[Tensor, int]]:
    return [item for item in items if item[1] == HEALTHY]


@pytest.mark.parametrize("fault", LOST)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_batch_was_never_seen(optimizer: str, fault: int) -> None:
    """Bugs: momentum, weight decay or step count that moved; running statistics with NaN; a schedule that went on."""
    items = with_fault(fault)
    skipped = fit(Net(optimizer, "step"), items, *skips())
    expected = fit(Net(optimizer, "step"), never_seen(items))
    assert_same(everything(skipped), everything(expected))
    assert skipped.global_step == 7


@pytest.mark.parametrize("fault", LOST)
@pytest.mark.parametrize("optimizer", FUSED)
def test_the_batch_was_never_seen_in_device_mode(optimizer: str, fault: int) -> None:
    """Bug: a kernel that counts the step, buffers that stay changed, a global step that is not taken back."""
    items = with_fault(fault)
    skipped = fit(Net(optimizer), items, *skips("device"))
    assert_same(everything(skipped), everything(fit(Net(optimizer), never_seen(items))))


@pytest.mark.parametrize("fault", [NAN_LOSS, HIGH_LOSS])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_loss_scaler_never_saw_it_either(optimizer: str, fault: int) -> None:
    """Bugs: a content skip that halves the scale or counts towards its growth; a drop left over for the next step."""
    items = with_fault(fault)
    skipped = fit(Net(optimizer, "step"), items, *skips("auto"), fp16=True)
    assert_same(everything(skipped), everything(fit(Net(optimizer, "step"), never_seen(items), fp16=True)))


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("fault", [NAN_LOSS, NAN_GRAD, INF_GRAD])
@pytest.mark.parametrize("mode", ["exact", "device"])
def test_any_position(mode: str, fault: int, at: int) -> None:
    """Bug: the first step (no optimizer state yet) or the last one (nothing follows) as special cases."""
    items = with_fault(fault, at)
    skipped = fit(Net("adamw-fused"), items, *skips(mode))
    assert_same(everything(skipped), everything(fit(Net("adamw-fused"), never_seen(items))))


class _Torch:
    """As torch, but uninitialised memory holds large numbers."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty_like(self, *args: Any, **options: Any) -> Tensor:
        return torch.full_like(*args, fill_value=7e37, **options)


@pytest.mark.parametrize("faults", [1, 2])
@pytest.mark.parametrize("mode", ["device", "overflow"])
def test_a_dropped_first_step_leaves_no_momentum(mode: str, faults: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: torch's fused SGD allocates its momentum in a step that the kernel then drops, and the next step takes what
    is in that memory for the momentum."""
    monkeypatch.setattr(sys.modules[torch.optim.SGD.__module__], "torch", _Torch())
    healthy = batches(*[HEALTHY] * 6)
    if mode == "device":
        items = [*batches(*[NAN_LOSS] * faults), *healthy]
        skipped, expected = fit(Net("sgd-fused"), items, *skips("device")), fit(Net("sgd-fused"), healthy)
        assert_same(everything(skipped), everything(expected))
        return
    scales = scaler(init_scale=2.0 ** (21 + faults))
    skipped = fit(Net("sgd-fused"), [*healthy, *healthy], SkipNonFinite(), plugins=[scales])
    assert 0 < skipped.global_step < 12
    weights = torch.cat([p.detach().flatten() for p in skipped.lightning_module.parameters()])
    assert weights.abs().max() < 1e3


@pytest.mark.parametrize("at", [0, 7])
def test_any_position_with_a_scaler(at: int) -> None:
    """Bug: a scale that is restored before the scaler has one, or too late."""
    items = with_fault(NAN_LOSS, at)
    skipped = fit(Net("adamw-foreach"), items, *skips("auto"), fp16=True)
    assert_same(everything(skipped), everything(fit(Net("adamw-foreach"), never_seen(items), fp16=True)))


@pytest.mark.parametrize("at", [2, 3])
@pytest.mark.parametrize("fp16", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "mode"), [("adamw-loop", "exact"), ("adamw-fused", "device"), ("sgd-momentum", "exact")]
)
def test_a_whole_accumulation_window_is_dropped(optimizer: str, mode: str, fp16: bool, at: int) -> None:
    """Bug: only the faulty micro-batch undone, as with statistics of the window's first micro-batch that stay."""
    if fp16:
        mode = "auto"
    items = with_fault(NAN_LOSS, at)
    skipped = fit(Net(optimizer), items, *skips(mode), accumulate_grad_batches=2, fp16=fp16)
    expected = fit(Net(optimizer), items[:2] + items[4:], accumulate_grad_batches=2, fp16=fp16)
    assert_same(everything(skipped), everything(expected))
    assert skipped.global_step == 3


def test_several_in_a_row_and_apart() -> None:
    """Bug: a flag of one skip that reaches into the next step."""
    faults = [NAN_LOSS, HEALTHY, NAN_GRAD, INF_GRAD, HEALTHY, HEALTHY, HIGH_LOSS, HEALTHY, NAN_LOSS]
    items = batches(*faults)
    for mode in ("exact", "device"):
        skipped = fit(Net("adamw-fused"), items, *skips(mode))
        assert_same(everything(skipped), everything(fit(Net("adamw-fused"), never_seen(items))))


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_a_scheduler_per_epoch_is_not_held(mode: str) -> None:
    """Bug: a learning rate per epoch that lags because the epoch's last batch was dropped."""
    items = with_fault(NAN_LOSS, at=7)
    skipped = fit(Net("adamw-fused", "epoch"), items, *skips(mode), max_epochs=2)
    expected = fit(Net("adamw-fused", "epoch"), never_seen(items), max_epochs=2)
    assert_same(everything(skipped), everything(expected))


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("at", [3, 4])
def test_a_run_limited_by_steps_makes_all_of_them(mode: str, at: int) -> None:
    """Bug: a dropped step that counts towards max_steps; in device mode also when it is the last one attempted."""
    items = with_fault(NAN_LOSS, at)
    skipped = fit(Net("adamw-fused"), items, *skips(mode), max_steps=5, max_epochs=-1)
    assert skipped.global_step == 5
    expected = fit(Net("adamw-fused"), never_seen(items), max_steps=5, max_epochs=-1)
    assert_same(everything(skipped), everything(expected))


class Swapper(nn.Module):
    """Replaces one buffer by a new tensor, adds to another in place, and makes or drops a third on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moving", torch.zeros(2))
        self.register_buffer("counting", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", None)
        self.register_buffer("given_up", torch.ones(3), persistent=False)

    def forward(self, x: Tensor) -> None:
        self.moving = self.moving * 0.5 + x
        self.counting += 1
        self.cache = x.clone()
        self.given_up = None


@pytest.mark.parametrize("dropped", [0.0, 1.0])
@pytest.mark.parametrize("where", ["host", "device"])
def test_buffers_of_every_kind(where: str, dropped: float) -> None:
    """Bug: buffers that are reassigned instead of changed in place, or that come and go, escape the undoing."""
    module = Swapper()
    watched = ModuleBuffers(module)
    watched.stash()
    for step in range(3):
        before = (module.moving.clone(), module.counting.clone())
        module(torch.full((2,), step + 1.0))
        after = (module.moving.clone(), module.counting.clone())
        if where == "device":
            watched.restore_where(torch.tensor(dropped))
        elif dropped:
            watched.restore()
        expected = before if dropped else after
        assert torch.equal(module.moving, expected[0])
        assert torch.equal(module.counting, expected[1])
        watched.stash()


def test_a_buffer_made_in_inference_mode() -> None:
    """Bug: a cache filled during the sanity check's inference mode has no version counter to ask for."""

    class Cached(Net):
        def __init__(self) -> None:
            super().__init__("adamw-fused")
            self.register_buffer("cache", torch.zeros(1), persistent=False)

        def validation_step(self, batch: tuple[Tensor, int], batch_idx: int) -> None:
            self.cache = batch[0].sum(1)

    items = with_fault(NAN_LOSS)
    for mode in ("exact", "device"):
        module = Cached()
        module.val_dataloader = lambda: loader(batches(HEALTHY))  # type: ignore[method-assign]
        trained = fit(module, items, *skips(mode), num_sanity_val_steps=1, val_check_interval=2)
        assert trained.global_step == 7
