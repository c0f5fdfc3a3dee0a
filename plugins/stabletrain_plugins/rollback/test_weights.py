"""Damage that shows in the weights: what is damage, and what is only a model that learns."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stabletrain.core.state import from_plain, to_plain
from stabletrain_plugins.rollback.weights import WeightCheck, WeightHistory, WeightMonitor, WeightSample

ONE_RANK: Any = SimpleNamespace(world_size=1, optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("place", [0, 7])
def test_one_bad_weight_anywhere_is_damage(value: float, place: int) -> None:
    # catches a norm that hides what it should show
    weights = [torch.full((8,), 0.1), torch.zeros(8), torch.zeros(0), torch.ones(3, dtype=torch.int8)]
    check = WeightCheck(["a", "b", "empty", "whole"], weights, 10.0)
    then = check.norms()
    assert check.problem(then, then) is None
    weights[1][place] = value
    assert "of b" in (check.problem(check.norms(), then) or "")


def test_a_model_that_began_with_zeros_may_grow() -> None:
    # catches a healthy first step that looks like infinite growth
    weights = [torch.zeros(4)]
    check = WeightCheck(["a"], weights, 10.0)
    then = check.norms()
    weights[0].fill_(1.0)
    assert check.problem(check.norms(), then) is None


class Learning:
    """Weights that move by about a thousandth of their size at every step."""

    def __init__(self) -> None:
        self.weights = [torch.ones(16), torch.full((4,), 0.5)]
        self.check = WeightCheck(["a", "b"], self.weights, 10.0)
        self.watch = WeightMonitor(self.check, every=10)
        self.step = 0

    def train(self, steps: int, share: float = 1e-3, suspicious: bool = False) -> list[str]:
        said = []
        for _ in range(steps):
            self.step += 1
            for each in self.weights:
                each.mul_(1.0 + share * (1.0 + 0.3 * math.sin(self.step)))
            problem = self.watch.look(ONE_RANK, self.step, suspicious)
            said += [problem] if problem else []
        return said


@pytest.mark.parametrize("steps", [100, 109])
def test_a_leap_is_damage_only_together_with_an_unhealthy_step(steps: int) -> None:
    # catches a learning rate that surges: the norms have not grown tenfold, but no batch is to blame; and a rollback
    # for a warm restart. At step 110 the look that is due sees the leap first, and must not take it for usual.
    run = Learning()
    assert not run.train(steps)
    assert not run.train(1, share=0.5), "a healthy step is no trouble"
    (said,) = run.train(1, share=0.0, suspicious=True)
    assert "the weights have moved " in said


def test_unhealthy_steps_alone_are_no_damage() -> None:
    # catches a rollback for every bad batch
    run = Learning()
    assert not run.train(150)
    assert not run.train(30, suspicious=True)
    assert not run.train(20, share=4e-3, suspicious=True), "four times as fast is within what happens"


def test_too_little_is_known_at_first() -> None:
    # catches a warm-up that is taken for damage
    run = Learning()
    run.train(40)
    assert not run.train(1, share=0.5, suspicious=True)


def test_weights_put_back_are_not_compared() -> None:
    # catches a rollback that is itself taken for damage
    run = Learning()
    run.train(100)
    run.watch.begin_anew()
    assert not run.train(1, share=0.9, suspicious=True)


def test_a_watch_goes_on_where_it_was() -> None:
    # catches a resumed run that judges otherwise than the one that was not killed
    whole, cut = Learning(), Learning()
    whole.train(125)
    cut.train(93)
    cut.watch = WeightMonitor(cut.check, 10, from_plain(WeightHistory, to_plain(cut.watch.seen)))
    cut.train(32)
    assert whole.watch.seen == cut.watch.seen
    assert whole.train(1, share=0.5, suspicious=True) == cut.train(1, share=0.5, suspicious=True) != []


def test_parts_of_a_model_are_not_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    # catches rank 0's norms that every rank takes for its own shard's
    class Sharded(Tensor):
        pass

    monkeypatch.setattr("stabletrain_plugins.rollback.weights.DTensor", Sharded)
    seen = WeightHistory(WeightSample(20, (1.0,), 0.1), WeightSample(10, (1.0,), 0.1), (1.0, 2.0))
    whole, part = torch.ones(2), torch.ones(2).as_subclass(Sharded)
    assert WeightMonitor(WeightCheck(["a"], [whole], 10.0), 10, seen).seen == seen
    blind = WeightHistory(WeightSample(20, (), 0.1), WeightSample(10, (), 0.1), (1.0, 2.0))
    assert WeightMonitor(WeightCheck(["a"], [part], 10.0), 10, seen).seen == blind
    assert WeightMonitor(WeightCheck(["a", "b"], [whole, whole], 10.0), 10, seen).seen == blind, "another model"
