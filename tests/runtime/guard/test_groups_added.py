"""Parameters that come to the optimizer, or leave it, during training are guarded and rolled back like the others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import EventRecorder, Net, Recorder, assert_same, batches, everything, fit
from going_back import GoBack
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import ClipNorm, ClipTensorwise, ClipUnitwise, MonitorGradients, Rollback, SkipNonFinite
from stabletrain.testing.trainer import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*already exist within another group:UserWarning"),
]
NORM = 0.1


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Two(LightningModule):
    """A backbone and a head; the optimizer gets what is trained at the beginning."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head = nn.Linear(8, 16), nn.Linear(16, 1)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.backbone(batch[0]).tanh()
        loss = nn.functional.mse_loss(self.head(hidden), batch[0].sum(1, keepdim=True))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)


class Norms(Callback):
    """The norm of all gradients that the optimizer applies, and the number of parameters with one."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, int]] = []

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm().item() if grads else 0.0
        self.rows.append((trainer.current_epoch, norm, len(grads)))


class Poison(Callback):
    """From epoch 1 on, makes the third gradient of the backbone NaN."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            count = iter(range(10**6))
            pl_module.backbone.weight.register_hook(lambda g: g * math.nan if next(count) == 2 else g)


class Extend(Callback):
    """The backbone is frozen, and its parameters come to the optimizer's one group before the second epoch."""

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.backbone.requires_grad_(True)
            trainer.optimizers[0].param_groups[0]["params"].extend(pl_module.backbone.parameters())


class TurnOn(Callback):
    """All parameters are in the optimizer; those of the backbone are trained from the second epoch on."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.backbone.requires_grad_(trainer.current_epoch > 0)


def train(*callbacks: Callback, **options: Any) -> tuple[Two, Trainer]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    module = Two()
    mine = quiet_trainer(*callbacks, max_epochs=3, log_every_n_steps=1, **options)
    mine.fit(module, DataLoader(TensorDataset(x), batch_size=8))
    return module, mine


@pytest.mark.parametrize("unfreeze", [lambda: BackboneFinetuning(1, verbose=False), Extend, TurnOn])
def test_parameters_that_are_trained_later_are_measured_clipped_and_skipped(unfreeze: Any) -> None:
    """Bug: the parameter list of the start: a NaN in an unfrozen group is applied, and its gradient is not clipped."""
    norms, recorder, events = Norms(), Recorder(), EventRecorder()
    plugins = [ClipNorm(NORM), SkipNonFinite(), recorder, MonitorGradients(every=1)]
    module, mine = train(*plugins, unfreeze(), Poison(), norms, events)
    applied = [norm for _, norm, _ in norms.rows if math.isfinite(norm)]
    assert max(applied) <= NORM * (1 + 1e-5)
    assert {(epoch > 0, count) for epoch, _, count in norms.rows} >= {(False, 2), (True, 4)}
    assert mine.callback_metrics["skipped"] == 1.0
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert mine.callback_metrics["grad_norm/backbone"] > 0.0
    assert any("backbone.weight" in each.reason for each in events.events if each.plugin == "monitor_gradients")


def test_transforms_see_groups_that_come_and_go() -> None:
    """Bugs: names of other parameters; a history that no longer fits the gradients."""

    class ComeAndGo(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            optimizer = trainer.optimizers[0]
            if batch_idx == 3:
                pl_module.extra = nn.Parameter(torch.zeros(6))
                pl_module.net.register_forward_pre_hook(lambda _, args: (args[0] + pl_module.extra,))
                optimizer.add_param_group({"params": [pl_module.extra]})
            if batch_idx == 6:
                del optimizer.param_groups[0]

    tensorwise = ClipTensorwise(warmup_steps=2)
    module, recorder = Net(), Recorder()
    plugins = [tensorwise, ClipUnitwise(exclude=["net.1.*"]), MonitorGradients(every=1), recorder]
    fit(module, batches(*[0] * 9), *plugins, ComeAndGo())
    assert math.isfinite(tensorwise.gamma("extra"))
    assert len(recorder.state) == 9
    assert recorder.state[-1].grad_norm < recorder.state[5].grad_norm, "the norm is that of the group that is left"


class Add(Callback):
    """Adds the backbone to the optimizer at the beginning of an epoch, at a step, or once.

    Args:
        when: ``"epoch"``, ``"step"``, or ``"once"``: it remembers that it has added the group.
    """

    def __init__(self, when: str) -> None:
        self.when, self.times = when, 0

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        pl_module.backbone.requires_grad_(False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.when == "epoch" and trainer.current_epoch == 1:
            self.add(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        at_step = self.when == "step" and trainer.global_step == 8
        if at_step or (self.when == "once" and self.times == batch_idx == 0 and trainer.current_epoch == 1):
            self.add(trainer, pl_module)

    def add(self, trainer: Trainer, module: Any) -> None:
        self.times += 1
        module.backbone.requires_grad_(True)
        trainer.optimizers[0].add_param_group({"params": list(module.backbone.parameters()), "lr": 0.003})


@pytest.mark.parametrize(("when", "times"), [("epoch", 2), ("step", 2), ("once", 1)])
def test_going_back_before_a_group_was_added(when: str, times: int) -> None:
    """Bugs: the snapshot is refused; the group is trained too early, added twice, or never trained again."""
    reference, mine = train(Add(when))
    back, add = GoBack(3, (11,)), Add(when)  # from batch 11, in epoch 1, to batch 6, in epoch 0
    other, theirs = train(back, add)
    assert back.went_back == 1
    assert add.times == times
    assert len(theirs.optimizers[0].param_groups) == 2
    if when != "once":
        assert other.losses[-16:] == reference.losses[-16:]
        assert_same(everything(mine), everything(theirs))
    else:  # trained again from one step later on
        assert not torch.equal(other.backbone.weight, Two().backbone.weight)


def test_going_back_without_rewinding_keeps_the_group() -> None:
    """Bug: a run that goes on with its next batch loses the group, which nothing adds again."""
    back, add = GoBack(3, (11,), rewind=False), Add("epoch")
    module, mine = train(back, add)
    assert back.went_back == 1
    assert len(mine.optimizers[0].param_groups) == 2
    assert not torch.equal(module.backbone.weight, Two().backbone.weight)


def test_a_parameter_that_is_younger_than_the_snapshot_is_as_it_was_when_it_came() -> None:
    """Bug: a rollback leaves damaged weights in a parameter that was added after the snapshot."""
    seen: list[Tensor] = []

    class Lora(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 9 and not hasattr(pl_module, "late"):
                pl_module.late = nn.Parameter(torch.ones(8))
                pl_module.backbone.register_forward_pre_hook(lambda _, args: (args[0] * pl_module.late,))
                trainer.optimizers[0].add_param_group({"params": [pl_module.late]})
            if hasattr(pl_module, "late"):
                seen.append(pl_module.late.detach().clone())

    module, mine = train(GoBack(3, (11,)), Lora())
    assert torch.equal(seen[0], torch.ones(8))
    assert not torch.equal(seen[1], torch.ones(8))
    assert torch.equal(seen[2], torch.ones(8)), "restored"
    assert not torch.equal(module.late, torch.ones(8)), "and trained again"
    assert len(mine.optimizers[0].param_groups) == 2


def test_damage_in_a_parameter_that_came_later_is_found() -> None:
    """Bug: the weight check reads the parameters of the start."""

    class Damage(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if trainer.global_step == 14 and not events.events:
                with torch.no_grad():
                    pl_module.late[0] = math.nan  # nothing uses it

        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 1 and not hasattr(pl_module, "late"):
                pl_module.late = nn.Parameter(torch.ones(8))
                trainer.optimizers[0].add_param_group({"params": [pl_module.late]})

    events = EventRecorder()
    module, _ = train(Damage(), Rollback(every=4, trust_after=1, check_every=2), events)
    assert any("norm of late is nan" in each.reason for each in events.events if each.kind == "rollback")
    assert bool(module.late.isfinite().all())
