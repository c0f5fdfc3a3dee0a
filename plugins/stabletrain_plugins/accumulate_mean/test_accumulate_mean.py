"""The gradient of a shorter accumulation window, compared with a loop in plain torch."""

import copy
import logging
from typing import Any

import pytest
import torch
from fits import HEALTHY, Net, Recorder, batches, everything, fit, loader
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from stabletrain import AccumulateMean, ClipNorm, Guard, SkipNonFinite

SIZE = 4
ITEMS = batches(*[HEALTHY] * 6)
FULL, REST = (0, 1, 2, 3), (4, 5)


class Cut(Net):
    """The first epoch ends before its sixth batch; its fifth is never part of a step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 5 else None


class Choosy(Net):
    """Leaves a micro-batch of the first window out."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx in (1, 2) else super().training_step(batch, batch_idx)


def reference(
    module: Net, windows: list[tuple[int, ...]], size: int | None = None
) -> tuple[dict[str, Any], list[float]]:
    """Weights, and the loss of each step; divided by what the window holds, or by ``size``."""
    module = copy.deepcopy(module)
    optimizer = module.configure_optimizers()
    losses = []
    for window in windows:
        optimizer.zero_grad()
        terms = [Net.training_step(module, ITEMS[i], i) / (size or len(window)) for i in window]
        for term in terms:
            term.backward()  # type: ignore[no-untyped-call]
        losses.append(float(sum(term.item() for term in terms)) * (size or len(window)) / len(window))
        optimizer.step()
    return dict(module.named_parameters()), losses


def assert_trained(module: Net, expected: dict[str, Any]) -> None:
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize(
    ("make", "options", "windows"),
    [
        (Net, {"max_epochs": 2}, [FULL, REST] * 2),
        (Net, {"limit_train_batches": 5, "max_epochs": 2}, [FULL, (4,)] * 2),
        (Cut, {"max_epochs": 3}, [FULL, FULL, REST, FULL, REST]),
        (Choosy, {}, [(0, 3), REST]),
        (Net, {"max_steps": 1}, [FULL]),
    ],
    ids=["epochs", "limited", "cut by -1", "None", "unfinished"],
)
@pytest.mark.parametrize("sized", [True, False])
def test_a_shorter_window_is_a_mean(make: type[Net], options: dict[str, Any], windows: Any, sized: bool) -> None:
    """Bugs: the rest of an epoch counts less, or what an unfinished window left is added to the next one's count."""
    module, recorder = make("sgd-momentum", norm=False), Recorder()
    expected, losses = reference(module, windows)
    fit(module, loader(ITEMS, sized), AccumulateMean(), recorder, accumulate_grad_batches=SIZE, **options)
    assert_trained(module, expected)
    assert [o.loss for o in recorder.state] == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_host_and_device_clip_the_weighted_gradient(mode: Any) -> None:
    """Bug: the norm is measured, and the gradient clipped, before it is weighted."""
    module, recorder = Net("sgd-fused", norm=False), Recorder()
    fit(module, ITEMS, recorder, ClipNorm(1.0), AccumulateMean(), Guard(mode=mode), accumulate_grad_batches=SIZE)
    bare, without = Net("sgd-fused", norm=False), Recorder()
    fit(bare, ITEMS, without, ClipNorm(1.0), Guard(mode=mode), accumulate_grad_batches=SIZE)
    (_, last), (_, plain) = recorder.state, without.state
    assert last.grad_norm == 2 * plain.grad_norm > 0
    assert last.applied_norm == pytest.approx(min(1.0, last.grad_norm))
    assert last.loss == plain.loss


@pytest.mark.parametrize("optimizer", ["sgd-momentum", "sgd-fused"])
def test_under_a_loss_scaler(optimizer: str) -> None:
    """Bug: scaled gradients are weighted twice, or the scaler's check for overflows comes after it."""
    ends = []
    for items in (ITEMS, ITEMS[:4]):
        module, recorder = Net(optimizer, norm=False), Recorder()
        fit(module, items, recorder, AccumulateMean(), accumulate_grad_batches=SIZE, fp16=True)
        ends.append(recorder.state)
    module, recorder = Net(optimizer, norm=False), Recorder()
    fit(module, ITEMS, recorder, accumulate_grad_batches=SIZE, fp16=True)
    assert ends[0][0] == ends[1][0] == recorder.state[0]
    assert ends[0][1].grad_norm == 2 * recorder.state[1].grad_norm


def test_windows_that_a_scheduler_of_lightnings_changes() -> None:
    """Bug: the size of the first epoch is used for all."""
    module = Net("sgd-momentum", norm=False)
    expected, _ = reference(module, [(0,), (1,), (2,), (3,), (4,), (5,), FULL, REST])
    fit(module, ITEMS, AccumulateMean(), GradientAccumulationScheduler({0: 1, 1: SIZE}), max_epochs=2)
    assert_trained(module, expected)


def test_without_it_lightning_is_as_it_is_and_full_windows_are_the_same(caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: on where nobody asked for it; a gradient multiplied by 1; said at every epoch, or not at all."""
    module = Net("sgd-momentum", norm=False)
    expected, losses = reference(module, [FULL, REST], size=SIZE)
    recorder = Recorder()
    with caplog.at_level(logging.INFO, "stabletrain"):
        fit(module, ITEMS, SkipNonFinite(), recorder, accumulate_grad_batches=SIZE)
        assert_trained(module, expected)
        assert [o.loss for o in recorder.state] == pytest.approx(losses, rel=1e-6)
        ends = []
        for plugins in ([], [AccumulateMean()]):
            ends.append(everything(fit(Net(), ITEMS, *plugins, SkipNonFinite(), accumulate_grad_batches=3)))
        assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
        assert not [r for r in caplog.records if "micro-batches" in r.getMessage()]
        fit(Net(), ITEMS, AccumulateMean(), accumulate_grad_batches=SIZE, max_epochs=2)
    (said,) = [r.getMessage() for r in caplog.records if "micro-batches" in r.getMessage()]
    assert "2 micro-batches instead of 4" in said
