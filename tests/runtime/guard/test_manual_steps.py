"""Manual optimization: each step of each optimizer is measured, judged and counted for itself."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, EventRecorder, Net, Recorder, SaveAfter, assert_same, fit, scaler
from fits import batches as net_batches
from gan import Gan, batches, end
from lightning.pytorch import Callback

from stabletrain import (
    ClipNorm,
    ClipPercentile,
    ClipTensorwise,
    ClipUnitwise,
    ClipValue,
    ClipZScore,
    DetectSpikes,
    MonitorGradients,
    ResumeExactly,
    Rollback,
    SaveCheckpoints,
    ScheduleLR,
    SkipNonFinite,
    SkipOutliers,
    UserError,
    announce,
)
from stabletrain.core.outcome import Outcome

G, D = "generator", "discriminator"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and interventions are written there."""
    monkeypatch.chdir(tmp_path)


def train(items: Any, *callbacks: Any, ckpt_path: Any = None, plugins: Any = None, **options: Any) -> Any:
    module = Gan(**options)
    torch.manual_seed(1)
    return fit(module, items, *callbacks, ckpt_path=ckpt_path, plugins=plugins)


@pytest.mark.parametrize(
    "options",
    [{}, {"toggle": True, "order": (G, D)}, {"closure": True, "to_none": False}, {"together": True, "order": (G, D)}],
    ids=["before", "toggled", "closure", "together"],
)
def test_the_history_of_each_optimizer_is_its_own_and_nothing_else_changes(options: Any) -> None:
    """Bug: a loss that is counted for another optimizer's step, one history for both, or weights that change."""
    items = batches([""] * 6)
    recorder = Recorder()
    watched = train(items, recorder, SkipNonFinite(), SkipOutliers(), Rollback(), MonitorGradients(), **options)
    assert_same(end(watched), end(train(items, **options)))
    assert watched.global_step == 12
    seen: list[tuple[Outcome, ...]] = recorder.states
    for which, outcomes in zip((G, D), seen, strict=True):
        assert [outcome.loss for outcome in outcomes] == pytest.approx(watched.lightning_module.losses[which])
        assert all(outcome.grad_norm > 0 for outcome in outcomes)
    first = options.get("order", (D, G))[0]
    assert [outcome.step for outcome in seen[0 if first == G else 1]] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("which", [G, D])
@pytest.mark.parametrize(("order", "toggle"), [((D, G), False), ((G, D), True)])
def test_a_nan_drops_the_step_of_one_optimizer(which: str, order: Any, toggle: bool) -> None:
    """Bug: the other optimizer's step is dropped or changed too, or running statistics stay NaN; at any position."""
    for position in (0, 2, 4):
        faults = [""] * 5
        faults[position] = which
        events = EventRecorder()
        guarded = train(batches(faults), events, SkipNonFinite(), MonitorGradients(every=1), order=order, toggle=toggle)
        omitted = train(batches([""] * 5), order=order, toggle=toggle, omit=(position, which))
        mine, theirs = end(guarded), end(omitted)
        if which == order[-1]:  # its network's statistics are as at the beginning of the batch, before the other's step
            weights = [name for name, _ in Gan().named_parameters()]
            for each in (mine, theirs):
                each["module"] = {name: each["module"][name] for name in weights}
        assert_same(mine, theirs)
        assert all(bool(value.isfinite().all()) for value in guarded.lightning_module.state_dict().values())
        assert guarded.global_step == omitted.global_step == 9
        assert {event.optimizer for event in events.events} == {which}
        assert all(event.reason.startswith(f"{which}: ") for event in events.events)
        assert guarded.callback_metrics[f"stability/skipped/{which}"] == 1
        assert guarded.callback_metrics[f"stability/skipped/{D if which == G else G}"] == 0
        assert guarded.callback_metrics["stability/skipped"] == 1


def stack() -> list[Any]:
    return [
        Recorder(),
        SkipNonFinite(),
        ClipZScore(warmup_steps=2),
        SkipOutliers(min_samples=2, window=4),
        ClipTensorwise(warmup_steps=3),
        Rollback(every=4, trust_after=2),
        MonitorGradients(every=2),
        ResumeExactly(),
    ]


def states(callbacks: list[Any]) -> Any:
    return {each.state_key: repr(each.states) for each in callbacks if hasattr(each, "states")}


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Bug: the history, or the count of steps, of the second optimizer is lost in a checkpoint; at any cut."""
    items = batches(["", "", D, "", G, ""])
    whole = stack()
    uninterrupted = train(items, *whole)
    for cut, before_the_guard in ((0, False), (1, True), (2, False), (3, True), (4, False)):
        path = tmp_path / f"{cut}.ckpt"
        save = SaveAfter(cut, path)
        train(items, *([save, *stack()] if before_the_guard else [*stack(), save]))
        rest = stack()
        torch.manual_seed(99)
        resumed = train(items, *rest, ckpt_path=path)
        assert_same(end(resumed), end(uninterrupted))
        assert resumed.global_step == uninterrupted.global_step == 10
        assert states(rest) == states(whole)
        assert [each["applied"] for each in rest[4].state_dict()["optimizers"]] == [5]


class Crash(Callback):
    """The process ends in the middle of a batch: one optimizer has stepped, the other has not."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == 4 and optimizer is trainer.optimizers[0]:
            raise KeyError("crash")


def test_resumed_from_saved_checkpoints_after_a_crash(tmp_path: Path) -> None:
    """Bug: checkpoints at intervals of steps miss them, since a batch has two, or do not resume exactly."""
    items = batches(["", D, "", "", "", G, ""])
    uninterrupted = train(items, *stack())
    with pytest.raises(KeyError):
        train(items, *stack(), SaveCheckpoints(tmp_path / "saved", every=3), Crash())
    torch.manual_seed(99)
    resumed = train(items, *stack(), SaveCheckpoints(tmp_path / "saved", every=3), ckpt_path=tmp_path / "saved")
    assert_same(end(resumed), end(uninterrupted))
    assert resumed.global_step == uninterrupted.global_step == 12


class Scheduled(Gan):
    """Steps a schedule by hand after each step of the generator."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(optimizers[0], 0.5)]


def test_schedules_stepped_by_hand() -> None:
    """Bug: a warning of torch's for a first step that is dropped; a schedule of ours that overwrites the module's."""
    mine = fit(Scheduled(), batches([G, "", ""]), SkipNonFinite())
    assert [each.param_groups[0]["lr"] for each in mine.optimizers] == [0.01 / 8, 0.01]
    with pytest.raises(UserError, match=r"Scheduled steps its own scheduler \(ExponentialLR\) by hand"):
        fit(Scheduled(), batches(["", ""]), ScheduleLR("constant"))
    with pytest.raises(UserError, match="unless the module steps by hand"):
        fit(Gan(), batches(["", ""]), ScheduleLR("cosine"))
    mine = fit(Gan(), batches([""] * 3), ScheduleLR("linear", lr_warmup=2), SkipNonFinite(), max_steps=6, max_epochs=-1)
    assert {each.param_groups[0]["lr"] for each in mine.optimizers} == {0.01}  # base rates again


def test_the_same_callbacks_in_another_fit() -> None:
    """Bug: the history of a second optimizer is taken over into a module with one, or another one is selected."""
    recorder, skip = Recorder(), SkipNonFinite()
    fit(Gan(), batches(["", D, ""]), recorder, skip)
    fit(Net(), net_batches(HEALTHY, HEALTHY), recorder, skip)
    assert [len(states) for states in recorder.states] == [2]
    assert "optimizers" not in skip.state_dict()
    fit(Gan(), batches(["", ""]), recorder, skip)
    assert [len(states) for states in recorder.states] == [2, 2]


def test_a_rollback_restores_both_optimizers() -> None:
    """Bug: after a rollback the second optimizer's state or history, or the count of steps, is that of undone steps."""
    items = batches(["", "", "", "", D, D, "", ""])
    events = EventRecorder()
    plugins = [Recorder(), SkipNonFinite(max_in_a_row=2), Rollback(every=2, trust_after=1, rewarm=0)]
    mine = train(items, *plugins, events)
    assert [event.optimizer for event in events.events if event.kind == "rollback"] == [""]
    bare = train([item for item in items if not item[2]])
    assert mine.global_step == bare.global_step == 12
    assert_same(end(mine), end(bare))
    recorded: Any = plugins[0]
    assert [len(states) for states in recorded.states] == [6, 6]


class Rising(Gan):
    """The discriminator's loss leaves its level for good, with the same gradients; later this is announced."""

    def loss(self, which: Any, batch: Any) -> torch.Tensor:
        if which == D and batch[2] == "announced":
            announce(self.trainer, "another loss")
        return super().loss(which, batch) + (100.0 if batch[2] and which == D else 0.0)


def test_a_higher_loss_of_one_of_several_is_not_worse() -> None:
    """Bug: a GAN whose generator gets better is rolled back, or its steps are dropped; or an announced change is
    learned only for the optimizer that steps next."""
    short: Any = {"window": 4, "min_samples": 2, "regime_after": 2, "min_sigma_norm": 10.0}
    outliers = SkipOutliers(max_in_a_row=3, tolerance=0, **short)
    rollback = Rollback(patience=2, delay=0, **short)
    recorder, events = Recorder(), EventRecorder()
    faults = [""] * 6 + ["high"] * 6 + ["announced"] + ["high"] * 2
    options: Any = {"max_steps": 200}  # so long that the loss has to fall in the first steps
    mine = fit(Rising(), batches(faults), outliers, rollback, recorder, events, **options)
    assert {event.kind for event in events.events if event.plugin != "recorder"} == {"announced"}
    assert mine.global_step == 30
    assert [len(states) for states in recorder.states] == [3, 3]


class ByHand(Gan):
    """One optimizer; gradients of two batches, each with two backward passes, make a step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        for _ in range(2):
            loss = self.loss("discriminator", batch)
            self.losses["discriminator"].append(loss.item() / 4)
            self.manual_backward(loss / 4)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.discriminator.parameters(), 0.1)


def test_all_other_plugins() -> None:
    """Bug: a plugin that ends the run where there are two optimizers, or clips only the first one."""
    clippers = [ClipNorm(0.01), ClipPercentile(), ClipValue(0.5), ClipUnitwise()]
    mine = train(batches(["", D, G, ""]), *clippers, DetectSpikes(), SaveCheckpoints("saved"), SkipNonFinite())
    assert mine.global_step == 6
    assert [mine.callback_metrics[f"stability/clipped_share/{which}"] for which in (D, G)] == [1.0, 1.0]
    assert {f"stability/spike_score/{D}", f"stability/spike_score/{G}"} <= set(mine.callback_metrics)


def test_gradients_accumulated_by_hand() -> None:
    """Bug: the loss of such a step is that of its last backward pass, or a NaN in its first batch stays in buffers."""
    recorder = Recorder()
    module = ByHand()
    mine = fit(module, batches([""] * 6), recorder, SkipNonFinite())
    losses = module.losses["discriminator"]
    expected = [sum(losses[i : i + 4]) for i in range(0, 12, 4)]
    assert [outcome.loss for outcome in recorder.state] == pytest.approx(expected)
    assert not any(key.count("/") > 1 for key in mine.callback_metrics)  # one optimizer needs no name
    for faulty in (2, 3):
        faults = [""] * 6
        faults[faulty] = D
        module = ByHand()
        mine = fit(module, batches(faults), SkipNonFinite())
        assert mine.global_step == 2
        kept = ByHand()
        items = batches([""] * 6)
        torch.manual_seed(0)
        fit(kept, [items[i] for i in (0, 1, 4, 5)])
        names = [key for key in module.state_dict() if key.startswith("discriminator")]
        assert_same({key: module.state_dict()[key] for key in names}, {key: kept.state_dict()[key] for key in names})


class SideBySide(Gan):
    """Two networks that have nothing to do with each other accumulate gradients of two batches by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        real, noise, fault = batch
        for which, net, x in ((G, self.generator, noise), (D, self.discriminator, real)):
            loss = net(x * (math.nan if fault == which else 1.0)).square().mean() / 2
            self.losses[which].append(loss.item())
            self.manual_backward(loss)
        if batch_idx % 2:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("which", [G, D])
def test_two_networks_that_accumulate_side_by_side(which: str) -> None:
    """Bug: a loss counts for every optimizer that has gradients, so that a NaN of one network drops both steps."""
    recorder = Recorder()
    module = SideBySide()
    mine = fit(module, batches(["", "", which, "", "", ""]), recorder, SkipNonFinite())
    assert mine.global_step == 5
    for name, outcomes in zip((G, D), recorder.states, strict=True):
        expected = [sum(module.losses[name][i : i + 2]) for i in range(0, 6, 2)]
        assert [outcome.loss for outcome in outcomes] == pytest.approx(expected, nan_ok=True)
        assert [outcome.skipped for outcome in outcomes] == [False, name == which, False]
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


class Split(Gan):
    """One loss whose gradients two optimizers apply, as with one for matrices and one for vectors."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        loss = self.loss("discriminator", batch)
        self.losses["discriminator"].append(loss.item())
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        net = self.discriminator
        vectors = [p for p in net.parameters() if p.ndim == 1]
        return torch.optim.SGD([net[0].weight, net[3].weight], 0.1), torch.optim.Adam(vectors, 0.1)


def test_one_loss_for_two_optimizers() -> None:
    """Bug: only the first of them has the loss, so that the other's step is refused or judged by nothing."""
    recorder = Recorder()
    module = Split()
    mine = fit(module, batches(["", D, ""]), recorder, SkipNonFinite())
    assert mine.global_step == 4
    for outcomes in recorder.states:
        assert [outcome.loss for outcome in outcomes] == pytest.approx(module.losses[D], nan_ok=True)
    assert {"stability/loss/optimizer_0", "stability/loss/optimizer_1"} <= set(mine.callback_metrics)


def test_a_loss_scale_that_two_optimizers_share() -> None:
    """Bug: with fp16, a bad batch of one optimizer lowers the scale, or its step is taken for an overflow for ever."""
    items = batches(["", D, "", ""])
    mine = train(items, Recorder(), SkipNonFinite(), plugins=[scaler(init_scale=64.0, growth_interval=100)])
    assert mine.global_step == 7
    assert mine.precision_plugin.scaler.get_scale() == 64.0
