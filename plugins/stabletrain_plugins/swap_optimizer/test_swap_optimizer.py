"""A swapped optimizer trains as one that the module's author would have written, in every kind of fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HIGH_LOSS, LARGE_GRAD, NAN_GRAD, EventRecorder, Net, SaveAfter, assert_same, batches, everything, fit
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD, Adam, AdamW

from stabletrain import (
    Guard,
    MuonAdamW,
    ResumeExactly,
    Rollback,
    ScheduleLR,
    SkipNonFinite,
    SkipOutliers,
    SwapOptimizer,
    UserError,
)
from stabletrain.optim.build import replace_configure_optimizers
from stabletrain.optim.options import GroupOptions
from stabletrain.testing import toy
from stabletrain.testing.trainer import trained_with

FAULTS = [
    *([0] * 20),
    NAN_GRAD,
    *([0] * 9),
    LARGE_GRAD,
    HIGH_LOSS,
    *([0] * 8),
    NAN_GRAD,
    NAN_GRAD,
    NAN_GRAD,
    *([0] * 5),
]
HALF = {"pattern": r"net\.4", "lr_scale": 0.5}
NEW = partial(AdamW, betas=(0.9, 0.95))


class ByHand(Net):
    """As `Net` with the new optimizer, in the groups that its author would have written."""

    def configure_optimizers(self) -> Any:
        weights = [each for each in self.parameters() if each.ndim == 2]
        norms = [self.net[1].weight]
        biases = [each for name, each in self.named_parameters() if "bias" in name]
        groups = [{"params": weights, "weight_decay": 0.1}, {"params": norms}, {"params": biases}]
        optimizer = AdamW(groups, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def stack() -> list[Callback]:
    return [SkipNonFinite(max_in_a_row=2), SkipOutliers(), Rollback(every=5, trust_after=2)]


@pytest.mark.parametrize("position", [0, 3])
def test_it_trains_as_the_same_optimizer_by_hand(position: int) -> None:
    """Bugs: the module's optimizer trains on; rates of the scheduler go to the old groups; guard, skipped steps or
    rollbacks use the old optimizer; the place in the list of callbacks matters."""
    reference = fit(ByHand(), batches(*FAULTS), *stack(), max_epochs=2)
    record = EventRecorder()
    callbacks: list[Callback] = [*stack(), record]
    callbacks.insert(position, SwapOptimizer(NEW))
    mine = fit(Net("adamw-loop", "step"), batches(*FAULTS), *callbacks, max_epochs=2)
    assert_same(everything(mine), everything(reference))
    assert {"skip", "rollback"} <= {event.kind for event in record.events}
    assert [group["kind"] for group in mine.optimizers[0].param_groups] == ["weight", "norm", "bias"]


def test_an_optimizer_that_divides_its_groups(tmp_path: Path) -> None:
    """Bugs: with an output layer in the group of hidden matrices a bare error of ``zip``; the names and the rates of
    a divided group are those of another one; a resume does not fit."""
    path = tmp_path / "a.ckpt"

    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net.insert(4, nn.Linear(16, 16))

        def configure_optimizers(self) -> Any:
            named = list(self.named_parameters())
            groups = [{"params": named[:3]}, {"params": named[3:], "lr": 0.04}]
            optimizer = AdamW(groups, 0.02, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda n: 0.9**n, lambda n: 0.5**n])
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Named()
    mine = fit(module, batches(0, 0, 0), SwapOptimizer(MuonAdamW), SaveAfter(1, path))
    names = {id(p): name for name, p in module.named_parameters()}
    rates = {}
    for group in mine.optimizers[0].param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        rates |= dict.fromkeys(group["param_names"], (group["lr"], group["use_muon"]))
    slow, fast = pytest.approx(0.02 * 0.9**3), pytest.approx(0.04 * 0.5**3)
    assert rates["net.0.weight"] == (slow, True)
    assert rates["net.0.bias"] == (slow, False)
    assert rates["net.4.weight"] == (fast, True)
    assert rates["net.5.weight"] == (fast, False)
    resumed = fit(Named(), batches(0, 0, 0), SwapOptimizer(MuonAdamW), ckpt_path=path)
    assert resumed.global_step == 3


def test_it_does_the_same_under_pytorch_lightning(tmp_path: Path) -> None:
    """Bug: a hook of one package, or a module that is compared with the class of the other."""
    one = toy.fit(tmp_path, [SwapOptimizer(NEW)])
    with trained_with("pytorch_lightning"):
        other = toy.fit(tmp_path, [SwapOptimizer(NEW)])
    assert_same((other.weights, other.optimizer, other.rates), (one.weights, one.optimizer, one.rates))
    assert len(one.optimizer["param_groups"]) == 3


def test_resumed_at_any_step_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: the optimizer's or scheduler's state of a checkpoint does not fit the groups; rates start again."""
    monkeypatch.chdir(tmp_path)
    cuts = (0, 5, 11, 12, 20)

    def callbacks(*cut: int) -> list[Callback]:
        saves = [SaveAfter(each, Path(f"{each}.ckpt")) for each in cut]
        return [SwapOptimizer(NEW), SkipNonFinite(), ResumeExactly(), *saves]

    items = batches(*([0] * 5), NAN_GRAD, *([0] * 6))
    reference = fit(Net("adamw-loop", "step", dropout=0.2), items, *callbacks(*cuts), max_epochs=2)
    for cut in cuts:
        path = f"{cut}.ckpt"
        resumed = fit(Net("adamw-loop", "step", dropout=0.2), items, *callbacks(), max_epochs=2, ckpt_path=path)
        assert_same(everything(resumed), everything(reference))


def test_a_resume_with_other_groups_is_one_message(tmp_path: Path) -> None:
    """Bug: torch's "parameter group that doesn't match", or moments of one tensor that go to another of its shape."""
    path = tmp_path / "a.ckpt"
    fit(Net(), batches(0, 0), SwapOptimizer(NEW), SaveAfter(1, path))
    other = SwapOptimizer(NEW, overrides=[HALF])
    with pytest.raises(UserError, match=r"groups of \[2, 1, 3\] tensors, this run's of \[1, 1, 1, 2, 1\]"):
        fit(Net(), batches(0, 0, 0), other, ckpt_path=path, max_epochs=2)


def test_schedule_lr_sets_the_rates_of_the_new_groups() -> None:
    """Bugs: base rates of the old groups; the options of single groups lost."""
    swap = SwapOptimizer(NEW, overrides=[HALF])
    rates: list[list[float]] = []

    class Record(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            rates.append([group["lr"] for group in optimizer.param_groups])

    schedule = ScheduleLR("linear", lr_warmup=0)
    fit(Net("adamw-loop"), batches(*[0] * 4), swap, schedule, Record())
    assert rates == [[base * schedule.factor(i) for base in (0.01, 0.005, 0.01, 0.01, 0.005)] for i in range(4)]


FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "optimizer": lambda o, s: o,
    "list": lambda o, s: [o],
    "tuple": lambda o, s: (o,),
    "lists": lambda o, s: ([o], [s]),
    "lists with a dictionary": lambda o, s: ([o], [{"scheduler": s, "interval": "step"}]),
    "list and scheduler": lambda o, s: ([o], s),
    "dictionary": lambda o, s: {"optimizer": o, "lr_scheduler": s},
    "list of dictionaries": lambda o, s: [{"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step"}}],
}


class Returns(Net):
    """Returns its optimizer and scheduler in one of the forms that Lightning accepts."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1, momentum=0.9)
        return FORMS[self.form](optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_lightning_accepts(form: str) -> None:
    """Bug: a form in which the old optimizer stays, or the scheduler is lost."""
    mine = fit(Returns(form), batches(0, 0), SwapOptimizer(partial(AdamW, lr=0.01)), max_epochs=2)
    (optimizer,) = mine.optimizers
    assert isinstance(optimizer, AdamW)
    configs = mine.lr_scheduler_configs
    assert [config.scheduler.optimizer is optimizer for config in configs] == [True] * (
        form not in ("optimizer", "list", "tuple")
    )
    steps = {0: 0, 1: 4 if "dictionar" in form and form != "dictionary" else 2}[len(configs)]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**steps)


@pytest.mark.parametrize(
    ("own", "new", "expected"),
    [
        (partial(AdamW, weight_decay=0.2), AdamW, {0.2, 0.0}),
        (partial(AdamW, weight_decay=0.2), partial(AdamW, weight_decay=0.3), {0.3, 0.0}),
        (Adam, AdamW, {0.0}),
        (Adam, partial(AdamW, weight_decay=0.3), {0.3, 0.0}),
        (partial(AdamW, weight_decay=0.2), torch.optim.Rprop, {None}),
    ],
)
def test_the_weight_decay_of_the_groups(own: Any, new: Any, expected: set[float | None]) -> None:
    """Bugs: the new class's default decay in place of the module's; a decay that the user gave and that is lost."""
    module = Net()
    module.configure_optimizers = lambda: own(module.parameters(), lr=0.01)  # type: ignore[method-assign]
    mine = fit(module, batches(0), SwapOptimizer(new))
    assert {group.get("weight_decay") for group in mine.optimizers[0].param_groups} == expected


def test_what_the_module_has_set_for_single_groups_is_kept() -> None:
    """Bugs: a group that the module exempts from decay decays; betas, names and membership of the groups lost."""
    module = Net()
    first, last = module.net[0], module.net[4]

    def configure() -> Any:
        groups = [
            {"params": list(first.named_parameters()), "weight_decay": 0.0, "betas": (0.5, 0.6), "note": "first"},
            {"params": list(last.named_parameters()), "lr": 0.02},
        ]
        return AdamW(groups, lr=0.01, weight_decay=0.1)  # type: ignore[arg-type]

    module.configure_optimizers = configure  # type: ignore[method-assign]
    mine = fit(module, batches(0, 0), SwapOptimizer(partial(AdamW, betas=(0.9, 0.95), weight_decay=0.3)))
    found = [
        (group["param_names"], group["weight_decay"], group["lr"], group["betas"], group.get("note"))
        for group in mine.optimizers[0].param_groups
    ]
    assert found == [
        (["weight"], 0.0, 0.01, (0.5, 0.6), "first"),
        (["bias"], 0.0, 0.01, (0.5, 0.6), "first"),
        (["weight"], 0.3, 0.02, (0.9, 0.95), None),
        (["bias"], 0.0, 0.02, (0.9, 0.95), None),
    ]


def test_the_command_lines_optimizer_and_options_are_taken() -> None:
    """Bugs: the optimizer that replaced the module's own is swapped, so that the scheduler is lost; options of
    ``param_groups`` without effect."""
    module = Net("adamw-loop", "step")
    undo = replace_configure_optimizers(module, lambda each: SGD(each.parameters()), GroupOptions(overrides=(HALF,)))
    with pytest.raises(UserError, match="differ; set them in one"):
        fit(module, batches(0), SwapOptimizer(AdamW, layer_decay=0.7))
    mine = fit(module, batches(0, 0), SwapOptimizer(AdamW))
    assert len(mine.lr_scheduler_configs) == 1
    assert len({group["initial_lr"] for group in mine.optimizers[0].param_groups}) > 1
    undo()
    assert "configure_optimizers" not in vars(module)


@pytest.mark.parametrize("raise_at", [None, 1])
def test_the_module_is_as_before(raise_at: int | None) -> None:
    """Bugs: a later fit without the plugin trains with its optimizer; a second fit swaps twice."""
    module, swap = Net(), SwapOptimizer(NEW)
    module.raise_at = raise_at
    if raise_at is None:
        fit(module, batches(0, 0), swap)
        assert fit(module, batches(0, 0), swap).optimizers[0].param_groups[0]["betas"] == (0.9, 0.95)
    else:
        with pytest.raises(RuntimeError, match="own bug"):
            fit(module, batches(0, 0), swap)
    assert "configure_optimizers" not in vars(module)
    assert swap._undo is None


class Several(Net):
    """Returns what its argument makes of the parameters."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self)


def _keeps(module: Any) -> Any:
    module.own = SGD(module.parameters())
    return module.own


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda m: [SGD(m.net[0].parameters()), SGD(m.net[4].parameters())], "expected one optimizer.*got 2"),
        (lambda m: ([SGD(m.net[0].parameters()), SGD(m.net[4].parameters())], []), "expected one optimizer.*got 2"),
        (lambda m: [{"optimizer": SGD(m.net[0].parameters())}] * 2, "expected one optimizer.*got 2"),
        (lambda m: None, "returned None"),
        (lambda m: "sgd", "expected an optimizer"),
        (_keeps, "keeps its optimizer in the attribute 'own'"),
        (lambda m: SGD(m.parameters(), lr=0.1, maximize=True), "maximizes"),
        (lambda m: SGD(m.parameters(), lr=0.0), "there is no ratio"),
        (lambda m: SGD(m.parameters()), "Minimizes cannot be made of the module's parameter groups: too many groups"),
    ],
)
def test_what_cannot_be_swapped_is_one_message(make: Any, text: str) -> None:
    """Bug: a traceback, or a run with an optimizer that nobody chose."""

    class Minimizes(AdamW):
        def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
            if "too many" in text:
                raise ValueError("too many groups")
            super().__init__(params, lr, weight_decay=weight_decay)

    new = partial(Minimizes, lr=0.01) if "ratio" in text else Minimizes
    with pytest.raises(UserError, match=text):
        fit(Several(make), batches(0), SwapOptimizer(new))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"optimizer": AdamW([nn.Parameter(torch.ones(1))])}, "an optimizer that exists already"),
        ({"optimizer": "adamw"}, "got 'adamw'"),
        ({"optimizer": lambda p: AdamW(p)}, "of which the arguments are not known"),
        ({"optimizer": nn.Linear}, "got torch.nn.modules.linear.Linear, which is none"),
        ({"optimizer": partial(AdamW, beta=(0.9, 0.95))}, "AdamW has no argument 'beta'; did you mean 'betas'"),
        ({"optimizer": AdamW, "layer_decay": math.nan}, r"SwapOptimizer\(layer_decay=\.\.\.\)"),
        ({"optimizer": AdamW, "overrides": [{"pattern": "("}]}, r"SwapOptimizer\(overrides=\.\.\.\)\[0\]\.pattern"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], text: str) -> None:
    """Bugs: a mistake that shows when training starts; a config key to somebody who has no config."""
    with pytest.raises(UserError, match=text):
        SwapOptimizer(**arguments)


def test_without_an_optimizer_or_twice(caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: nothing is swapped, and nothing says so; two that replace each other."""
    with caplog.at_level("WARNING", "stabletrain"):
        assert isinstance(fit(Net(), batches(0), SwapOptimizer()).optimizers[0], AdamW)
    assert "the module's own is used" in caplog.text
    with pytest.raises(UserError, match="SwapOptimizer is given twice"):
        fit(Net(), batches(0), SwapOptimizer(AdamW), SwapOptimizer(AdamW), Guard())
