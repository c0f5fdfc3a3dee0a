"""Every scheduler of torch gives the same rates after it was moved to an optimizer with other groups."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from stabletrain.errors import UserError
from stabletrain.optim.options import GroupOptions
from stabletrain_plugins.swap_optimizer.swap import swap

Make = Callable[[Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, [lambda i: 0.9**i, lambda i: 0.5**i]),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, [lambda i: 0.9, lambda i: 0.5]),
    "StepLR": lambda o: lrs.StepLR(o, 2),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lrs.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lrs.LinearLR(o, 0.1, 1.0, 4),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 5, eta_min=1e-4),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, eta_min=1e-4),
    "CyclicLR": lambda o: lrs.CyclicLR(o, [1e-3, 2e-3], [1e-2, 3e-2], 2, base_momentum=[0.8, 0.7]),
    "CyclicLR-exp": lambda o: lrs.CyclicLR(o, 1e-3, 1e-2, 2, mode="exp_range", gamma=0.9, cycle_momentum=False),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, [1e-2, 2e-2], 8, base_momentum=[0.8, 0.7]),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=0, factor=0.3, min_lr=[1e-3, 1e-5]),
    "SWALR": lambda o: SWALR(o, [0.05, 0.01], anneal_epochs=3),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 2), lrs.CosineAnnealingLR(o, 4)], [2]),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler([lrs.ConstantLR(o, 0.1, 2), lrs.ExponentialLR(o, 0.9)]),
}


class Two(nn.Module):
    """Two layers in groups with different rates; weights and biases of each are in one group."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def configure(self, make: Make, kind: Callable[..., Optimizer] = AdamW) -> tuple[Optimizer, Any]:
        groups = [{"params": list(self.body.parameters()), "lr": 0.02}, {"params": list(self.head.parameters())}]
        optimizer = kind(groups, lr=0.01, weight_decay=0.0)
        return optimizer, make(optimizer)


def train(module: Two, optimizer: Optimizer, scheduler: Any, steps: int = 8) -> list[dict[str, Any]]:
    """The rate and momentum of each parameter in each step."""
    names = {id(each): name for name, each in module.named_parameters()}
    rows = []
    for step in range(steps):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = module.head(module.body(x).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        rows.append(
            {
                names[id(p)]: (g["lr"], g.get("betas"), g.get("momentum"))
                for g in optimizer.param_groups
                for p in g["params"]
            }
        )
        optimizer.step()
        if step < steps - 1:
            scheduler.step(loss.item()) if isinstance(scheduler, lrs.ReduceLROnPlateau) else scheduler.step()
    rows.append({name: each.detach().clone() for name, each in module.named_parameters()})
    return rows


def swapped(module: Two, make: Make, new: Any, **options: Any) -> tuple[Optimizer, Any]:
    optimizer, scheduler = module.configure(make)
    output = swap(module, ([optimizer], [{"scheduler": scheduler, "monitor": "x"}]), new, GroupOptions(**options), "k")
    assert output[1][0]["scheduler"] is scheduler
    return output[0][0], scheduler


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_and_weights_are_those_without_the_swap(name: str) -> None:
    """Bugs: a list with a value for each group that stays as long as it was; a group that gets another one's value;
    a scheduler within another that still steps the old optimizer; torch's warning that no step was taken."""
    bare, moved = Two(), Two()
    expected = train(bare, *bare.configure(SCHEDULERS[name]))
    optimizer, scheduler = swapped(moved, SCHEDULERS[name], AdamW)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1, 1]
    found = train(moved, optimizer, scheduler)
    assert found[:-1] == expected[:-1]
    assert all(torch.equal(found[-1][key], expected[-1][key]) for key in expected[-1])
    again = Two()
    other, resumed = swapped(again, SCHEDULERS[name], AdamW)
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(optimizer.state_dict())
    assert len(other.param_groups) == 4


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in ("ReduceLROnPlateau", "LinearLR")])
def test_a_learning_rate_of_the_new_optimizer_scales_the_whole_curve(name: str) -> None:
    """Bugs: rates that a scheduler keeps as absolute numbers (max_lr, eta_min, swa_lr) that stay as they were."""
    bare, moved = Two(), Two()
    expected = train(bare, *bare.configure(SCHEDULERS[name]))
    found = train(moved, *swapped(moved, SCHEDULERS[name], partial(AdamW, lr=0.03)))
    for mine, theirs in zip(found[:-1], expected[:-1], strict=True):
        assert mine == {key: (pytest.approx(3 * value[0], rel=1e-9), *value[1:]) for key, value in theirs.items()}


def test_a_given_rate_is_kept_to_the_last_bit() -> None:
    """Bug: 3e-4 * (1e-4 / 3e-4) instead of 1e-4."""
    for usual, given in ((3e-4, 1e-4), (1e-3, 3e-5), (0.1, 0.3)):
        module = Two()
        output = swap(module, AdamW(module.parameters(), lr=usual), partial(AdamW, lr=given), GroupOptions(), "k")
        assert {group["lr"] for group in output.param_groups} == {given}


def test_cycled_momentum_leaves_the_other_betas_alone() -> None:
    """Bug: a scheduler that writes the first beta brings the old optimizer's second one with it."""
    optimizer, _ = swapped(Two(), SCHEDULERS["OneCycleLR"], partial(AdamW, betas=(0.9, 0.95)))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.95, 0.95)}


class OwnScheduler(lrs.LRScheduler):
    """One that keeps a value for each group under a name of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.ends = [0.1] * len(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        return [group["lr"] * end for group, end in zip(self.optimizer.param_groups, self.ends, strict=True)]


def _uses_optimizer(optimizer: Optimizer) -> Any:
    return lrs.LambdaLR(optimizer, lambda step: float(optimizer.param_groups[0]["lr"] > 0))


@pytest.mark.parametrize(
    ("make", "new", "text"),
    [
        (OwnScheduler, AdamW, "OwnScheduler.ends"),
        (_uses_optimizer, AdamW, "refers to the optimizer"),
        (SCHEDULERS["OneCycleLR"], SGD, "cycles 'betas'"),
        (lambda o: lrs.SequentialLR(o, [lrs.ConstantLR(o), OwnScheduler(o)], [2]), AdamW, "OwnScheduler.ends"),
    ],
)
def test_what_cannot_be_moved_is_one_message(make: Make, new: Any, text: str) -> None:
    """Bug: an IndexError of zip in the middle of the run, or rates of the wrong group."""
    with pytest.raises(UserError, match=text):
        swapped(Two(), make, new)


def test_an_own_scheduler_moves_if_the_groups_are_the_same() -> None:
    """Bug: refusing what works: with one kind of parameter per group, every list still fits."""
    module = Two()
    del module.head
    module.body = nn.Linear(3, 3, bias=False)
    optimizer = AdamW(module.parameters(), lr=0.01)
    scheduler = OwnScheduler(optimizer)
    new = swap(module, ([optimizer], [scheduler]), SGD, GroupOptions(), "k")[0][0]
    new.step()
    scheduler.step()
    assert new.param_groups[0]["lr"] == pytest.approx(0.0001)
