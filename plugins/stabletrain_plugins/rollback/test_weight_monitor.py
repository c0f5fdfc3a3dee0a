"""Damaged weights are found, and a model that learns is not taken for damaged."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from stabletrain.core.state import from_plain, to_plain
from stabletrain_plugins.rollback.weight_check import WeightCheck
from stabletrain_plugins.rollback.weight_monitor import WeightHistory, WeightMonitor, WeightProblem, WeightSample

ONE_RANK: Any = SimpleNamespace(
    world_size=1, is_global_zero=True, strategy=None, optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])]
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
@pytest.mark.parametrize("position", [0, 7])
def test_one_bad_weight_anywhere_is_damage(value: float, position: int) -> None:
    """Bug: one bad value is lost in a norm."""
    weights = [torch.full((8,), 0.1), torch.zeros(8), torch.zeros(0), torch.ones(3, dtype=torch.int8)]
    check = WeightCheck(zip(["a", "b", "empty", "integer"], weights, strict=True), 10.0)
    then = check.norms()
    assert check.problem(then, then) is None
    weights[1][position] = value
    assert "of b" in (check.problem(check.norms(), then) or "")


def test_a_model_that_began_with_zeros_may_grow() -> None:
    """Bug: a healthy first step is taken for infinite growth."""
    weights = [torch.zeros(4)]
    check = WeightCheck([("a", weights[0])], 10.0)
    then = check.norms()
    weights[0].fill_(1.0)
    assert check.problem(check.norms(), then) is None


@pytest.mark.parametrize("small", [3, 40])
def test_norms_of_few_and_of_many_small_tensors(small: int) -> None:
    """Bugs: the norms of small tensors, which are computed together, in another order; damage in one not found."""
    weights = []
    for i in range(small):
        weights += [torch.randn(1 + i % 7, i % 3, 2), torch.randn(7, 5).t()]
    weights[4:4] = [torch.randn(30, 30), torch.randn(4, dtype=torch.float64), torch.randn(9).bfloat16()]
    names = [str(i) for i in range(len(weights))]
    check = WeightCheck(zip(names, weights, strict=True), 10.0)
    expected = [torch.linalg.vector_norm(each.double()).item() for each in weights if each.numel()]
    before = check.norms()
    assert before == pytest.approx(expected, rel=1e-5)
    assert check.problem(before, before) is None
    weights[-1][2, 1] = math.nan
    assert check.problem(check.norms(), before) == f"the norm of {names[-1]} is nan"
    weights[-1][2, 1] = 100.0
    assert f"the norm of {names[-1]} went" in str(check.problem(check.norms(), before))


class Learning:
    """Weights that move by about a thousandth of their size at every step."""

    def __init__(self) -> None:
        self.weights = [torch.ones(16), torch.full((4,), 0.5)]
        self.check = WeightCheck(zip("ab", self.weights, strict=True), 10.0)
        self.monitor = WeightMonitor(self.check, every=10)
        self.step = 0

    def train(self, steps: int, share: float = 1e-3, unhealthy: bool = False) -> list[WeightProblem]:
        problems: list[WeightProblem] = []
        for _ in range(steps):
            self.step += 1
            for each in self.weights:
                each.mul_(1.0 + share * (1.0 + 0.3 * math.sin(self.step)))
            problem = self.monitor.check(ONE_RANK, self.step, unhealthy)
            problems += [problem] if problem else []
        return problems


@pytest.mark.parametrize("steps", [100, 109])
def test_a_fast_change_is_damage_only_together_with_an_unhealthy_step(steps: int) -> None:
    """Bug: a surge of the learning rate is missed, as norms have not grown tenfold; or a warm restart is undone.

    At step 110, the regular sample comes after the change, and must not count as usual.
    """
    run = Learning()
    assert not run.train(steps)
    assert not run.train(1, share=0.5), "the step was healthy"
    (problem,) = run.train(1, share=0.0, unhealthy=True)
    assert "the weights have changed " in problem.reason
    assert not problem.damaged, "their size is not wrong"


@pytest.mark.parametrize(("norm", "damaged"), [(1.99, False), (2.01, True)])
def test_twice_the_largest_of_the_last_speeds_is_not_damage(norm: float, damaged: bool) -> None:
    """Bug: a run whose weights move unevenly is rolled back for a speed that it had before.

    Six times the median speed is 6, twice the largest is 10. A norm that changes by a share of 1 within a step, at a
    learning rate of 0.1, is a speed of 10. The last speed is not used: its sample may have come after the damage.
    """
    speeds = (1.0, 1.0, 5.0, *[1.0] * 6, 100.0)
    weight = torch.tensor([norm])
    history = WeightHistory(WeightSample(100, (1.0,), 0.1), None, speeds)
    monitor = WeightMonitor(WeightCheck([("a", weight)], 10.0), every=10, history=history)
    problem = monitor.check(ONE_RANK, 101, unhealthy=True)
    assert (problem is not None) == damaged
    assert not damaged or "(limit 10)" in str(problem)


@pytest.mark.parametrize(("step", "good_at"), [(5, 0), (10, 0), (11, 10), (29, 20), (30, 20)])
def test_the_last_check_without_damage_is_named(step: int, good_at: int) -> None:
    """Bug: a snapshot is restored whose weights were already damaged, because the check that found it counts."""
    run = Learning()
    assert not run.train(step - 1)
    run.weights[1][2] = math.nan
    (problem,) = run.train(1, unhealthy=True)
    assert problem == WeightProblem("the norm of b is nan", True, good_at)


def test_unhealthy_steps_alone_are_no_damage() -> None:
    """Bug: a rollback for every bad batch."""
    run = Learning()
    assert not run.train(150)
    assert not run.train(30, unhealthy=True)
    assert not run.train(20, share=4e-3, unhealthy=True), "four times as fast is healthy"


def test_no_speed_is_judged_at_first() -> None:
    """Bug: a learning-rate warm-up is taken for damage."""
    run = Learning()
    run.train(40)
    assert not run.train(1, share=0.5, unhealthy=True)


def test_restored_weights_are_not_compared_with_undone_ones() -> None:
    """Bug: a rollback is itself taken for damage."""
    run = Learning()
    run.train(100)
    run.monitor.forget_norms()
    assert not run.train(1, share=0.9, unhealthy=True)


def test_a_resumed_monitor_equals_an_uninterrupted_one() -> None:
    """Bug: a resumed run judges the weights differently than the run that was not killed."""
    whole, cut = Learning(), Learning()
    whole.train(125)
    cut.train(93)
    cut.monitor = WeightMonitor(cut.check, 10, from_plain(WeightHistory, to_plain(cut.monitor.history)))
    cut.train(32)
    assert whole.monitor.history == cut.monitor.history
    assert whole.train(1, share=0.5, unhealthy=True) == cut.train(1, share=0.5, unhealthy=True) != []


def test_norms_of_shards_or_of_another_model_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: after a resume, every rank compares its own shard with rank 0's, whose norms are in the checkpoint."""

    class Sharded(Tensor):
        pass

    monkeypatch.setattr("stabletrain_plugins.rollback.weight_check.DTensor", Sharded)
    history = WeightHistory(WeightSample(20, (1.0,), 0.1), WeightSample(10, (1.0,), 0.1), (1.0, 2.0))
    whole, shard = torch.ones(2), torch.ones(2).as_subclass(Sharded)
    assert WeightMonitor(WeightCheck([("a", whole)], 10.0), 10, history).history == history
    without = WeightHistory(WeightSample(20, (), 0.1), WeightSample(10, (), 0.1), (1.0, 2.0))
    assert WeightMonitor(WeightCheck([("a", shard)], 10.0), 10, history).history == without
    assert WeightMonitor(WeightCheck([("a", whole), ("b", whole)], 10.0), 10, history).history == without


@pytest.mark.parametrize("saved", [False, True])
def test_a_check_that_is_read_later_finds_the_same(saved: bool) -> None:
    """Bugs: damage that is found after a checkpoint was saved is forgotten; the next step's weights are compared.

    A run that resumes from that checkpoint must find the damage, too: it is not compared with itself.
    """
    at_once, later = Learning(), Learning()
    for step in range(1, 41):
        for each in (at_once, later):
            for weight in each.weights:
                weight.mul_(1.0 + 1e-3 * math.sin(step))
            if step == 30:
                each.weights[1][0] = 1e3
        before = at_once.monitor.history
        problem = at_once.monitor.check(ONE_RANK, step)
        history = at_once.monitor.history
        delayed = later.monitor.check(ONE_RANK, step, later=True)
        if step == 30:
            assert problem is not None
            assert delayed is None
            expected = problem
            if saved:
                resumed = WeightMonitor(later.check, 10, later.monitor.history)
                assert resumed.history == before
                assert resumed.check(ONE_RANK, 31) == expected
        elif step == 31:
            assert delayed == expected
        if step == 40 or (saved and step != 30):
            assert later.monitor.history == history


def test_copies_of_8_bit_weights_are_not_kept() -> None:
    """Bug: a float32 copy of all weights stays in memory between two checks."""
    check = WeightCheck([("a", torch.ones(4).to(torch.float8_e4m3fn))], 10.0)
    assert check._read_now is None
    check.refresh()
    assert check.unread_norms() is not None
    assert check._read_now is None
