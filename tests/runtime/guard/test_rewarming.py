"""After a rollback the learning rate climbs again: a factor within the step, on top of whatever sets the rates."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, EventRecorder, Net, SaveAfter, assert_same, batches, everything, fit, loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import lr_scheduler

from stabletrain import Guard, ScheduleLR, SkipNonFinite
from stabletrain.core.events import Request, RequestKind
from stabletrain.core.limits import Limits
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule
from stabletrain.runtime.guard.callbacks import as_callback

EIGHT = batches(*[HEALTHY] * 8)
CLIMB = [1.0, 1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0]
"""The factors of eight steps, with a climb over 4 steps that was requested at the third."""


@dataclass(frozen=True)
class AskRule(Rule[None]):
    """Request climbs: attempted step -> length."""

    plugin = "ask"
    slot = "ask"

    at: Any = ((2, 4),)

    def init(self) -> None:
        return

    def limits(self, state: None) -> Limits:
        return Limits()

    def observe(self, state: None, outcome: Outcome) -> Observation[None]:
        steps = dict(self.at).get(outcome.step)
        asks = () if steps is None else (Request(RequestKind.REWARM, self.label, "loss 9 > 3", steps),)
        return Observation(state, (), asks)


Ask = as_callback(AskRule)


class Rates(Net):
    """Records the rates of all groups within each step, and those between the steps."""

    def __init__(self, optimizer: str = "adamw-foreach", scheduler: Callable[[Any], Any] | None = None) -> None:
        super().__init__(optimizer)
        self.make_scheduler = scheduler
        self.used: list[list[float]] = []
        self.between: list[list[float]] = []

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_pre_hook(lambda opt, *_: self.used.append(rates(opt)))
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]

    def on_train_batch_end(self, *args: Any) -> None:
        self.between.append(rates(self.trainer.optimizers[0]))


def rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


class SetByHand(Rates):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.01 * 0.7**batch_idx


class TensorRate(Rates):
    """Two groups, whose rate is one tensor."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[4].parameters()}]
        optimizer = torch.optim.AdamW(groups, torch.tensor(0.01), fused=True)
        optimizer.register_step_pre_hook(lambda opt, *_: self.used.append(rates(opt)))
        return optimizer


class AddGroup(Callback):
    """Adds a parameter group in the middle of the climb."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            trainer.optimizers[0].add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})


CASES: dict[str, tuple[Callable[[], Rates], Callable[[], list[Callback]]]] = {
    "constant": (Rates, list),
    "set by hand": (SetByHand, list),
    "a tensor": (TensorRate, list),
    "StepLR": (lambda: Rates(scheduler=lambda o: lr_scheduler.StepLR(o, 2, 0.5)), list),
    "ExponentialLR": (lambda: Rates(scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.9)), list),
    "ScheduleLR": (Rates, lambda: [ScheduleLR("cosine", lr_warmup=2)]),
    "a new group": (Rates, lambda: [AddGroup()]),
    "averaging": (Rates, lambda: [StochasticWeightAveraging(1e-4, swa_epoch_start=1, annealing_epochs=1)]),
}


@pytest.mark.parametrize("name", CASES)
def test_the_climb_is_a_factor_on_whatever_rate_is_set(name: str) -> None:
    """Bugs: no climb, because a scheduler sets the rate; a scheduler that computes with a lowered rate; a group left
    out, or scaled twice because it shares a tensor."""
    make, others = CASES[name]
    usual, climbing = make(), make()
    epochs = 2 if name == "averaging" else 1
    for module, callbacks in ((usual, [SkipNonFinite()]), (climbing, [SkipNonFinite(), Ask()])):
        fit(module, EIGHT, *callbacks, *others(), max_epochs=epochs)
    factors = CLIMB + [1.0] * (len(usual.used) - 8)
    wanted = [[lr * factor for lr in each] for each, factor in zip(usual.used, factors, strict=True)]
    for mine, theirs in zip(climbing.used, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
    assert climbing.between == usual.between


@pytest.mark.parametrize("optimizer", ["adamw-fused", "sgd-fused"])
def test_both_modes_climb_alike(optimizer: str) -> None:
    """Bug: with decisions on the device the climb begins a step late, or counts a dropped step as applied."""
    items = batches(HEALTHY, HEALTHY, HEALTHY, NAN_LOSS, HEALTHY, HEALTHY, HEALTHY, HEALTHY, HEALTHY)
    used = {}
    for mode in ("exact", "device"):
        module = Rates(optimizer)
        fit(module, items, SkipNonFinite(), Ask(at=((2, 4),)), Guard(mode=mode))
        used[mode] = [each[0] for each in module.used]
    assert used["exact"] == pytest.approx([0.01 * factor for factor in CLIMB])
    # on the device the request is known one step later, and the kernel is called for the dropped step too
    assert used["device"] == pytest.approx([0.01 * f for f in (1.0, 1.0, 1.0, 1.0, 0.25, 0.5, 0.75, 1.0, 1.0)])


@pytest.mark.parametrize("fp16", [False, True])
def test_a_dropped_step_does_not_advance_the_climb(fp16: bool) -> None:
    """Bug: the climb counts attempted steps, so that it is over before the weights have moved."""
    module = Rates()
    items = batches(HEALTHY, HEALTHY, HEALTHY, HEALTHY, NAN_LOSS, NAN_LOSS, HEALTHY, HEALTHY, HEALTHY, HEALTHY)
    fit(module, items, SkipNonFinite(), Ask(), fp16=fp16)
    assert [each[0] for each in module.used] == pytest.approx([0.01 * factor for factor in CLIMB])


def test_a_new_climb_replaces_the_old_one() -> None:
    """Bug: two factors multiplied, or the second request ignored."""
    module = Rates()
    fit(module, EIGHT, Ask(at=((1, 5), (3, 2), (4, 4), (5, 0))))
    factors = [1, 1, 1 / 5, 2 / 5, 1 / 2, 1 / 4, 1, 1]
    assert [each[0] for each in module.used] == pytest.approx([0.01 * factor for factor in factors])


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("at", range(1, 7))
def test_resumed_equals_uninterrupted_at_any_cut(at: int, mode: Any, tmp_path: Path) -> None:
    """Bug: a run that is killed during a climb continues at the full rate, or climbs from the start again."""
    path = tmp_path / "at.ckpt"

    def members() -> list[Any]:
        return [SkipNonFinite(), Ask(), Guard(mode=mode)]

    whole = fit(Rates("adamw-fused"), EIGHT, *members(), SaveAfter(at, path))
    rest = loader(EIGHT[at + 1 :], sized=False)
    again = fit(Rates("adamw-fused"), rest, *members(), ckpt_path=path)
    if mode == "device" and at == 2:
        return  # the request is in flight in the checkpoint: it was made, and is executed at the next batch's end
    assert_same(everything(again), everything(whole))


def test_the_climb_is_an_event_and_the_logged_rate_contains_it(tmp_path: Path) -> None:
    """Bugs: a climb that nobody sees; `lr` missing from the default stack, or the rate without the climb."""
    logger, listener, module = CSVLogger(tmp_path), EventRecorder(), Rates()
    fit(module, EIGHT, SkipNonFinite(), Ask(), LearningRateMonitor(), listener, logger=logger)
    header, *lines = [line.split(",") for line in Path(logger.log_dir, "metrics.csv").read_text().splitlines()]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    ours = [float(row["stability/lr"]) for row in rows if row["stability/lr"]]
    assert ours == [each[0] for each in module.used] == pytest.approx([0.01 * factor for factor in CLIMB])
    monitored = [float(row["lr-AdamW"]) for row in rows if row["lr-AdamW"]]
    assert set(monitored) == {0.01}, "between the steps the rate is that of the module"
    (event,) = [each for each in listener.events if each.kind == "rewarm"]
    assert (event.step, event.plugin, event.value) == (2, "ask", 4.0)
    assert event.reason == "learning rate climbs over 4 steps from step 3: loss 9 > 3"


def test_after_an_exception_in_the_step_the_rate_is_as_before() -> None:
    """Bug: a run that is interrupted within a step leaves the lowered rate in the optimizer."""

    class Failing(Rates):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_pre_hook(self.fail)
            return optimizer

        def fail(self, *_: Any) -> None:
            if len(self.used) == 5:
                raise RuntimeError("within the step")

    module = Failing()
    with pytest.raises(RuntimeError, match="within the step"):
        fit(module, EIGHT, Ask())
    assert module.used[-1] == pytest.approx([0.005])
    assert rates(module.trainer.optimizers[0]) == [0.01]
