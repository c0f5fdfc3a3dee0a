"""With several optimizers: hidden state, parameter groups that are added in training, batches without a step."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import EventRecorder, Recorder, assert_same, fit
from gan import Gan, batches, end
from lightning.pytorch import Callback
from torch import Tensor, nn

from stabletrain import ClipNorm, MonitorGradients, Rollback, SkipNonFinite
from stabletrain.runtime.hidden.hidden_state import HiddenState

G, D = "generator", "discriminator"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and interventions are written there."""
    monkeypatch.chdir(tmp_path)


class Memory(nn.Module):
    """Adds what it remembers of earlier inputs; a NaN stays in it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(0)
        self.seen = mean if self.seen is None else 0.9 * self.seen + 0.1 * mean
        return x + self.seen


class Remembers(Gan):
    """Both networks have hidden state, and so has the module itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.generator = nn.Sequential(Memory(), *self.generator)
        self.discriminator = nn.Sequential(Memory(), *self.discriminator)
        self.last: Any = None

    def loss(self, which: Any, batch: Any) -> Tensor:
        loss = super().loss(which, batch)
        if self.last is not None:
            loss = loss + 0.01 * self.last
        self.last = loss.detach()
        return loss

    def hidden(self) -> list[Tensor]:
        return [self.generator[0].seen, self.discriminator[0].seen, self.last]  # type: ignore[list-item]


def ends(mine: Any) -> dict[str, Any]:
    return {**end(mine), "hidden": mine.lightning_module.hidden()}


def run(module: Any, faults: list[str], *callbacks: Any, leave_out: bool = False) -> Any:
    items = [item for item in batches(faults) if not (leave_out and item[2])]
    torch.manual_seed(1)
    return fit(module, items, *callbacks)


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("which", [G, D])
def test_hidden_state_is_restored_as_buffers_are(which: str, position: int) -> None:
    """Bug: a NaN stays in the hidden state of one of both networks, or the state of a step that was made is undone."""
    faults = [""] * 5
    faults[position] = which
    guarded = run(Remembers(), faults, SkipNonFinite())
    assert guarded.global_step == 9
    assert all(bool(each.isfinite().all()) for each in guarded.lightning_module.hidden())
    if which == D:  # nothing was changed in this batch before the step
        assert_same(ends(guarded), ends(run(Remembers(omit=(position, which)), [""] * 5)))


def test_a_rollback_restores_hidden_state_of_all() -> None:
    """Bug: after a rollback the hidden state of the second optimizer's network is that of undone steps."""
    faults = ["", "", "", "", D, D, "", ""]
    plugins = [SkipNonFinite(max_in_a_row=2), Rollback(every=2, trust_after=1, rewarm=0)]
    events = EventRecorder()
    mine = run(Remembers(), faults, *plugins, events)
    assert "rollback" in {event.kind for event in events.events}
    assert_same(ends(mine), ends(run(Remembers(), faults, leave_out=True)))


def test_hidden_state_of_some_modules() -> None:
    """Bug: a copy for one optimizer overwrites that of another whose window is in progress, when it is first found."""
    module: Any = nn.ModuleList([Memory(), Memory()])
    one, other = module
    hidden = HiddenState(module)
    hidden.stash({one, other})
    one.seen, other.seen = torch.full((1,), math.nan), torch.ones(1)
    hidden.stash({other})
    other.seen = torch.full((1,), math.nan)
    hidden.restore()
    assert one.seen is None
    assert torch.equal(other.seen, torch.ones(1))


class Unfreeze(Callback):
    """The first layer of a network comes to its optimizer with the second batch."""

    def __init__(self, which: str) -> None:
        self.which, self.norms = which, list[float]()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        getattr(pl_module, self.which)[0].requires_grad_(False)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == 1 and not getattr(pl_module, self.which)[0].weight.requires_grad:
            layer = getattr(pl_module, self.which)[0].requires_grad_(True)
            trainer.optimizers[self.which == D].add_param_group({"params": list(layer.parameters())})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if optimizer is trainer.optimizers[self.which == D] and grads:
            self.norms.append(torch.stack([each.norm() for each in grads]).norm().item())


class Late(Gan):
    """Only what requires gradients is in an optimizer at the beginning. Gradients are removed after the step."""

    def __init__(self, nan_at: int | None = None, which: str = G) -> None:
        super().__init__(toggle=True)
        if nan_at is not None:
            count = iter(range(100))
            weight = getattr(self, which)[0].weight
            self.after = lambda: weight.register_hook(lambda g: g * math.nan if next(count) == nan_at else g)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1 and hasattr(self, "after"):
            self.after()

    def configure_optimizers(self) -> Any:
        nets = (self.generator, self.discriminator)
        return [torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2) for net in nets]


@pytest.mark.parametrize("which", [G, D])
def test_groups_that_are_added_to_one_of_several(which: str) -> None:
    """Bug: a NaN in a group that is added during training is applied, or its gradient is not clipped or measured."""
    unfreeze, recorder = Unfreeze(which), Recorder()
    module = Late(nan_at=1, which=which)
    mine = run(module, [""] * 5, ClipNorm(0.05), SkipNonFinite(), MonitorGradients(every=1), recorder, unfreeze)
    assert mine.callback_metrics[f"stability/skipped/{which}"] == mine.callback_metrics["stability/skipped"] == 1
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert [len(group["params"]) for group in mine.optimizers[which == D].param_groups] == [4, 2]
    assert [len(states) for states in recorder.states] == [5, 5]
    applied = [norm for norm in unfreeze.norms if math.isfinite(norm)]
    assert len(applied) >= 4
    assert max(applied) <= 0.05 * (1 + 1e-5)


@pytest.mark.parametrize("which", [G, D])
def test_a_rollback_with_groups_that_were_added(which: str) -> None:
    """Bug: the snapshot restores the groups of the first optimizer only."""
    faults = ["", "", "", "", D, D, "", ""]
    plugins = [SkipNonFinite(max_in_a_row=2), Rollback(every=2, trust_after=1, rewarm=0)]
    events = EventRecorder()
    mine = run(Late(), faults, Unfreeze(which), *plugins, events)
    assert "rollback" in {event.kind for event in events.events}
    assert_same(end(mine), end(run(Late(), faults, Unfreeze(which), leave_out=True)))


class PassesOver(Gan):
    """Computes the losses of a bad batch, and makes no step with it."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch[2]:
            self.loss(batch[2], batch)
            return
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("which", [G, D])
def test_a_batch_that_the_module_passes_over(which: str) -> None:
    """Bug: running statistics stay NaN for ever after a bad batch of which the module makes no step; or it counts."""
    mine = run(PassesOver(), ["", "", which, ""], SkipNonFinite())
    assert all(bool(value.isfinite().all()) for value in mine.lightning_module.state_dict().values())
    assert mine.global_step == 6
    assert mine.callback_metrics["stability/skipped"] == 0
