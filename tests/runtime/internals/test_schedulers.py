"""The attributes of torch's schedulers that are lists with a value for each group are those that we know."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import SGD
from torch.optim import lr_scheduler as lrs

from stabletrain.runtime.internals import schedulers
from stabletrain.runtime.internals.schedulers import RateChange, mark_step, retarget


def _optimizer(groups: int, momentum: float = 0.9) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.ones(1))]} for _ in range(groups)], lr=0.1, momentum=momentum)


def test_every_list_of_a_scheduler_is_known() -> None:
    """Bug: a version of torch with a list for each group under another name, which would be refused."""
    count = 11  # no scheduler has a list of that length for another reason
    made: list[Any] = [
        lrs.LambdaLR(_optimizer(count), lambda step: 1.0),
        lrs.MultiplicativeLR(_optimizer(count), lambda step: 1.0),
        lrs.OneCycleLR(_optimizer(count), 0.1, 5),
        lrs.CyclicLR(_optimizer(count), 0.1, 0.2),
        lrs.ReduceLROnPlateau(_optimizer(count)),
        lrs.CosineAnnealingLR(_optimizer(count), 5),
    ]
    known = schedulers._RATES | schedulers._OTHERS
    for each in made:
        lists = {name for name, value in vars(each).items() if isinstance(value, list) and len(value) == count}
        assert lists <= known, type(each).__name__
    assert {"base_lrs", "_last_lr"} <= set(vars(made[0]))


def test_nothing_is_changed_if_one_part_cannot_be_moved() -> None:
    """Bug: a scheduler of which a half steps another optimizer."""
    old, new = _optimizer(1), _optimizer(2)
    first, second = lrs.ConstantLR(old), lrs.ConstantLR(old)
    second.unknown = [1.0]  # type: ignore[attr-defined]
    whole = lrs.ChainedScheduler([first, second])
    before = dict(vars(first))
    assert "ConstantLR.unknown" in str(retarget(whole, old, new, [0, 0], [RateChange()] * 2))
    assert vars(first) == before


def test_a_marked_optimizer_counts_its_steps_and_keeps_its_rates() -> None:
    """Bugs: torch's warning that no step was taken; a rate that starts at its base rate again."""
    optimizer = _optimizer(1)
    optimizer.param_groups[0] |= {"initial_lr": 0.1, "lr": 0.03}
    mark_step(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert hasattr(optimizer.step, "_wrapped_by_lr_sched")
