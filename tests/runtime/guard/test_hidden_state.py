"""Tensors in attributes of modules are put back with a dropped step and by a rollback, as buffers are."""

from __future__ import annotations

import copy
import gc
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from fits import assert_same
from going_back import GoBack
from recurrent import KINDS, STEPS, Recurrent, data, end, train
from torch import Tensor, nn

from stabletrain import Guard, SkipNonFinite
from stabletrain.runtime.hidden.hidden_state import HiddenState

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("bad", [(5,), (0,), (0, 1, 7, 11)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_batch_was_never_seen(kind: str, bad: tuple[int, ...]) -> None:
    """Bug: a NaN batch poisons the hidden state, and every later batch with it."""
    module, reference = Recurrent(kind), Recurrent(kind)
    mine = train(module, data(bad), SkipNonFinite())
    theirs = train(reference, data(missing=bad))
    assert_same(end(module, mine), end(reference, theirs))
    assert module.seen == list(range(STEPS)), "other values stay: they say what was attempted"


@pytest.mark.parametrize("bad", [(5,), (0,), (0, 1, 7, 11)])
@pytest.mark.parametrize("kind", ["tuple", "dict", "in place"])
def test_a_dropped_batch_was_never_seen_in_device_mode(kind: str, bad: tuple[int, ...]) -> None:
    """Bug: the device drops the step, and the hidden state keeps the NaN."""
    module, reference = Recurrent(kind, fused=True), Recurrent(kind, fused=True)
    mine = train(module, data(bad), SkipNonFinite(), Guard(mode="device"))
    theirs = train(reference, data(missing=bad))
    ends = end(module, mine), end(reference, theirs)
    for each in ends:
        del each["epoch"]  # a list that only grows is not put back, so as not to wait for the device
    assert_same(*ends)


@pytest.mark.parametrize("kind", KINDS)
def test_a_healthy_run_is_bit_identical(kind: str) -> None:
    """Bugs: copying draws random numbers, or changes what the module keeps."""
    module, reference = Recurrent(kind), Recurrent(kind)
    assert_same(end(module, train(module, data(), SkipNonFinite())), end(reference, train(reference, data())))


def test_accumulation_windows_are_dropped_as_a_whole() -> None:
    """Bug: only the last micro-batch's change is undone."""
    module, reference = Recurrent(), Recurrent()
    mine = train(module, data((4,)), SkipNonFinite(), accumulate_grad_batches=2)
    theirs = train(reference, data(missing=(4, 5)), accumulate_grad_batches=2)
    assert_same(end(module, mine), end(reference, theirs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [4, 8, 14])
def test_going_back_restores_it(kind: str, at: int) -> None:
    """Bug: a rollback leaves the hidden state of the undone steps; 12 batches are an epoch."""
    module, reference = Recurrent(kind), Recurrent(kind)
    mine = train(module, data(), GoBack(3, (at,)), max_epochs=2)
    theirs = train(reference, data(), max_epochs=2)
    assert_same(end(module, mine), end(reference, theirs))


class Watched(nn.Module):
    """Attributes of every kind, most of which are no hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = torch.arange(4.0)
        self.tied = self.weight = nn.Parameter(torch.ones(2))
        self.metric = torchmetrics.MeanMetric()
        self.lstm = nn.LSTM(2, 2)
        self.pruned = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.old = nn.utils.prune.identity(nn.Linear(2, 2), "weight")
        self.rows: list[Any] = []
        self.names = {"a": 1}
        self.late: Any = None

    def step(self) -> None:
        self.metric.update(torch.ones(()))
        self.old(torch.ones(1, 2))
        self.pruned(torch.ones(1, 2))
        self.rows.append((len(self.rows), 0.5))
        self.late = torch.full((2,), float(len(self.rows)))
        self.lstm.hidden = torch.ones(1) * len(self.rows)


def test_only_what_changes_is_named_and_once() -> None:
    """Bugs: constants, metrics, pruned weights or lists of numbers named; hidden state on a module of torch missed."""
    module = Watched()
    hidden = HiddenState(module)
    messages: list[str] = []
    for _ in range(4):
        hidden.stash()
        messages += hidden.news()
        module.step()
    assert len(messages) == 1
    assert "attributes late, lstm.hidden," in messages[0]
    assert set(hidden.values(changed=True)) == {"late", "lstm.hidden"}


class Memory:
    def __init__(self) -> None:
        self.bank = torch.zeros(3)
        self.fixed = torch.ones(3)


def test_what_cannot_be_kept_is_said() -> None:
    """Bugs: an object, a generator, or a value too large, whose tensors change without a word."""
    module: Any = nn.Sequential()
    module.__class__ = type("Mine", (nn.Sequential,), {"__module__": "mine"})
    module.memory, module.constant = Memory(), Memory()
    module.generator, module.teachers = torch.Generator(), [nn.Linear(2, 2)]
    hidden = HiddenState(module)
    messages: list[str] = []
    for _ in range(3):
        hidden.stash()
        messages += hidden.news()
        module.memory.bank += 1
        torch.rand(1, generator=module.generator)
        with torch.no_grad():
            module.teachers[0].weight += 1
        module.large = torch.empty(65 << 18)
    assert [m.split(" cannot")[0] for m in messages] == [
        "hidden state: large",
        "hidden state: memory, generator, teachers",
    ]


def test_it_is_told_to_the_user_once_in_a_fit(caplog: pytest.LogCaptureFixture) -> None:
    """Bug: the user does not know that the attribute is kept, or hears of it at every step."""
    with caplog.at_level(logging.WARNING, "stabletrain"):
        train(Recurrent(), data(), SkipNonFinite())
    told = [record.message for record in caplog.records if "hidden state" in record.message]
    assert len(told) == 1
    assert "cell.state" in told[0]


def test_no_graph_and_no_old_value_is_kept_alive() -> None:
    """Bug: the copy of a value that is part of an autograd graph keeps the whole graph in memory."""
    module: Any = nn.Module()
    module.out = None
    hidden = HiddenState(module)
    graphs: list[Any] = []
    for _ in range(3):
        hidden.stash()
        weight = torch.ones(2, requires_grad=True)
        module.out = weight * 2
        graphs.append(weakref.ref(weight))
        del weight
    module.out = None
    gc.collect()
    assert [each() for each in graphs] == [None] * 3


Change = Callable[[Any], None]


def _replace(module: Any) -> None:
    module.a = module.a + 1


def _in_place(module: Any) -> None:
    module.a.add_(1)


def _delete(module: Any) -> None:
    del module.a


def _reshape(module: Any) -> None:
    module.a = torch.zeros(5)


def _to_list(module: Any) -> None:
    module.a = [module.a, math.nan]


@pytest.mark.parametrize("change", [_replace, _in_place, _delete, _reshape, _to_list])
@pytest.mark.parametrize("dropped", [0.0, 1.0, None])
def test_every_change_is_undone_or_kept(change: Change, dropped: float | None) -> None:
    """Bug: an attribute that comes, goes or changes its shape escapes the undoing, on the host or on the device."""
    module: Any = nn.Module()
    module.a, module.b, module.c = torch.arange(3.0), None, {"x": torch.ones(2)}
    module.view = module.a[:2]
    hidden = HiddenState(module)
    hidden.stash()
    before = {key: copy.deepcopy(getattr(module, key)) for key in "abc"}
    change(module)
    module.b = torch.full((2,), math.nan)
    module.d = [torch.full((2,), math.nan)]
    module.c["y"] = torch.zeros(1)
    after = {key: copy.deepcopy(module.__dict__.get(key)) for key in "abcd"}
    hidden.restore() if dropped is None else hidden.restore_where(torch.tensor(dropped))
    expected = after if dropped == 0.0 else {**before, "d": None}
    now = {key: module.__dict__.get(key) for key in "abcd"}
    assert str(now) == str(expected)


def test_an_alias_of_a_buffer_is_the_buffers_business() -> None:
    """Bug: changes of running statistics are not counted: an old copy of them overwrites the right ones."""

    class Aliases(Recurrent):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)
            self.alias, self.view = self.norm.running_mean, [self.norm.running_var[:2]]  # type: ignore[index]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((self.norm(batch[0]), batch[1]), batch_idx)

    module, reference = Aliases(), Aliases()
    mine, theirs = train(module, data((5,)), SkipNonFinite()), train(reference, data(missing=(5,)))
    assert_same(end(module, mine), end(reference, theirs))
