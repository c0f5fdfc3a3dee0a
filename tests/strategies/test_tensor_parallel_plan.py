"""Which layers a plan names, and what is refused before any process is waited for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabletrain import FSDP2TensorParallelStrategy, TensorParallelStrategy, UserError
from stabletrain.strategies.tensor_parallel_plan import assign
from stabletrain.workloads import CharGPT, DigitsCNN

SMALL = {"layers": 2, "heads": 6, "width": 48, "context": 8, "vocab_size": 10}
PLAN = CharGPT.tensor_parallel_plan


def gpt(**options: object) -> CharGPT:
    return CharGPT(**{**SMALL, **options})  # type: ignore[arg-type]


def test_the_plan_of_the_gpt_names_its_layers() -> None:
    """Bugs: a pattern that spans dots, or misses a block; norms of q and k that are left out."""
    found = assign(gpt(qk_norm=True), PLAN, 2, "X")
    blocks = ("net.blocks.0", "net.blocks.1")
    assert found.colwise == {f"{b}.{each}": n for b in blocks for each, n in (("attention.qkv", 3), ("mlp.0", 1))}
    assert set(found.rowwise) == {f"{b}.{each}" for b in blocks for each in ("attention.out", "mlp.2")}
    assert set(found.partial) == {f"{b}.attention.{each}_norm.weight" for b in blocks for each in ("query", "key")}
    assert found.divided == [f"{b}.attention.heads" for b in blocks]
    assert assign(gpt(), PLAN, 2, "X").partial == []  # without q/k norms the pattern is not a mistake


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.conv = nn.Conv1d(2, 2, 1)
        self.part = nn.Parameter(torch.zeros(4))
        self.count, self.is_on = 3, True


@pytest.mark.parametrize(
    ("plan", "degree", "message"),
    [
        ({"one.x": "colwise"}, 2, "no module of Tied has such a name"),
        ({"on": "colwise"}, 2, "did you mean 'one'"),
        ({"other": "rowwise"}, 2, "other.weight is also one.weight|one.weight is also other.weight"),
        ({"one": "columns"}, 2, "expected one of the styles 'colwise'"),
        ({"one": "colwise:0"}, 2, "expected one of the styles 'colwise'"),
        ({"one": "rowwise:3"}, 2, "expected one of the styles 'colwise'"),
        ({"one": 3}, 2, "expected one of the styles 'colwise'"),
        ({"conv": "colwise"}, 2, "expected conv to be an nn.Linear layer, got Conv1d"),
        ({"one": "colwise", "o*": "rowwise"}, 2, "one has the style 'colwise' by another pattern"),
        ({"one": "colwise:3"}, 2, "one.out_features=4 is not a multiple of 3"),
        ({"one": "colwise"}, 3, "3 ranks do not divide one.out_features=4"),
        ({"one": "colwise:2"}, 4, "4 ranks do not divide one.out_features/2=2"),
        ({"one": "rowwise"}, 3, "3 ranks do not divide one.in_features=4"),
        ({"part": "colwise"}, 2, "no module of Tied has such a name"),
        ({"nothing": "partial"}, 2, "no module or parameter of Tied"),
    ],
)
def test_a_plan_that_does_not_fit_is_one_message(plan: dict[str, str], degree: int, message: str) -> None:
    """Bugs: a name that nothing has is passed over; a width that is padded; a tied weight of which one half is cut."""
    with pytest.raises(UserError, match=message):
        assign(Tied(), plan, degree, "X")


def test_attributes_and_single_parameters_are_named() -> None:
    """Bugs: an attribute of the wrong type is divided; a parameter without a module of its own cannot be named."""
    module = nn.ModuleDict({"a": Tied()})
    assert assign(module, {"a.part": "partial"}, 2, "X").partial == ["a.part"]
    assert assign(module, {"a.count": "divide"}, 3, "X").divided == ["a.count"]
    for attribute, message in (("count", "2 ranks do not divide a.count=3"), ("is_on", "to be an integer, got True")):
        with pytest.raises(UserError, match=message):
            assign(module, {f"a.{attribute}": "divide"}, 2, "X")
    with pytest.raises(UserError, match="no attribute"):
        assign(module, {"a.size": "divide"}, 2, "X")


@pytest.mark.parametrize(
    ("strategy", "module", "processes", "message"),
    [
        (TensorParallelStrategy(), gpt(), 4, "4 ranks do not divide net.blocks.0.attention.heads=6"),
        (TensorParallelStrategy(size=2), gpt(), 4, "expected 2 processes, got 4.*strategy=fsdp2_tp"),
        (TensorParallelStrategy(), DigitsCNN(), 2, "DigitsCNN has no attribute tensor_parallel_plan"),
        (TensorParallelStrategy(plan={}), gpt(), 2, "no plan was given"),
        (FSDP2TensorParallelStrategy(size=2), gpt(), 5, "a multiple of it, got 5"),
        (FSDP2TensorParallelStrategy(size=4), gpt(), 4, "at least twice 4.*strategy=tensor_parallel"),
        (
            FSDP2TensorParallelStrategy(size=2),
            gpt(heads=10, width=50),
            8,
            "4 groups do not divide .*qkv.in_features=50",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_one_message(
    strategy: TensorParallelStrategy, module: CharGPT, processes: int, message: str
) -> None:
    """Bugs: an error of torch, in each process, after the start; a head that is cut in the middle."""
    with pytest.raises(UserError, match=message):
        strategy.check_plan(module, processes)
    fitting = TensorParallelStrategy()
    fitting.check_plan(gpt(), 3)


@pytest.mark.parametrize("size", [0, -1, True, 1.5])
def test_a_size_that_is_no_number_of_processes_is_refused(size: object) -> None:
    """Bug: an error of torch's device mesh."""
    with pytest.raises(UserError, match=r"size=\.\.\."):
        TensorParallelStrategy(size=size)  # type: ignore[arg-type]


def test_torch_that_cannot_divide_fused_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: torch 2.11 fails in each process, in the middle of a redistribution; the message names no layer."""
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    with pytest.raises(UserError, match=r"blocks\.0\.attention\.qkv holds several matrices.*expected torch 2\.12"):
        TensorParallelStrategy().check_plan(gpt(), 2)
    monkeypatch.setattr(torch, "__version__", "2.13.0a0+gitabc")
    TensorParallelStrategy().check_plan(gpt(), 2)
