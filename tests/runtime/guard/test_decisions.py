"""All ranks decide alike whatever happens on one of them, under every strategy; and how many collectives it takes."""

from pathlib import Path

import decisions_on_ranks as script
import pytest
import torch
from decisions_on_ranks import FAULTS, Result
from rank_pool import on_ranks

Case = tuple[str, str, str]
"""Strategy, fault, reaction."""

REACTIONS = ("bare", "skip", "rollback", "halt")
ALL = [(fault, reaction) for fault in FAULTS[1:] for reaction in REACTIONS]
QUICK = [
    ("ddp", "loss", "skip"),
    ("fsdp2", "inf gradient", "halt"),
    ("ddp", "weights", "rollback"),
    ("fsdp2", "weights", "rollback"),
    ("ddp", "gradient", "fp16"),
]

SKIPPED_AT = script.FAULT_AT
EVENTS = {
    "bare": [(SKIPPED_AT, "nonfinite")],
    "skip": [(SKIPPED_AT, "nonfinite")],
    "rollback": [(SKIPPED_AT + 1, "rewarm"), (SKIPPED_AT + 1, "rollback")],
    "halt": [(SKIPPED_AT, "nonfinite"), (SKIPPED_AT + 1, "nonfinite"), (SKIPPED_AT + 1, "stop")],
}


def check(case: Case, ranks: list[Result]) -> None:
    """All ranks have seen and done the same, and what the fault calls for."""
    _, fault, reaction = case
    first = ranks[0]
    for rank in ranks[1:]:
        assert repr(rank[:4]) == repr(first[:4]), case
        assert all(map(torch.equal, rank.weights, first.weights)), case
    if fault == "none":
        assert (first.events, first.ended, first.applied) == ([], "", 12), case
    elif reaction == "fp16":  # an overflow, which the loss scaler drops
        assert (first.events, first.ended) == ([], ""), case
        assert all(weight.isfinite().all() for weight in first.weights), case
    elif fault == "micro-batch":
        assert (SKIPPED_AT // 3, "nonfinite") in first.events, case
        assert bool(first.ended) == (reaction == "halt"), case
    elif fault == "weights" and reaction != "rollback":  # every step is non-finite from then on
        assert first.events == EVENTS["halt"], case
        assert "2 non-finite steps in a row" in first.ended, case
    else:
        assert first.events[-len(EVENTS[reaction]) :] == EVENTS[reaction], case
        assert bool(first.ended) == (reaction == "halt"), case
        assert all(weight.isfinite().all() for weight in first.weights), case


def run(size: int, cases: list[Case], folder: Path) -> list[dict[Case, Result]]:
    """Train each case on several ranks, and check it."""
    ranks = on_ranks(script.matrix, size, folder, cases, limit=300)
    for case in cases:
        check(case, [rank[case] for rank in ranks])
    return ranks


def test_two_ranks_decide_alike(tmp_path: Path) -> None:
    """Bugs: the rank that alone sees a NaN, in its loss, its copy of a gradient or its shard, skips, stops or goes back
    alone; a strategy that trains other weights than DDP."""
    strategies = ("ddp", "fsdp2", "zero1")
    ranks = run(
        2, [*((each, fault, "bare") for fault in ("none", "gradient") for each in strategies), *QUICK], tmp_path
    )
    for fault in ("none", "gradient"):
        ddp, *others = (ranks[0][each, fault, "bare"] for each in strategies)
        for other in others:
            assert other.events == ddp.events
            assert repr([o[0] for o in other.outcomes]) == repr([o[0] for o in ddp.outcomes])
            assert all(map(torch.equal, other.weights, ddp.weights))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", list(script.STRATEGIES))
def test_the_whole_matrix(strategy: str, tmp_path: Path) -> None:
    """Bugs: as above, for every fault and reaction; with replicated shards, on four ranks."""
    size = 4 if strategy == "hsdp" else 2
    run(size, [(strategy, *pair) for pair in ALL], tmp_path)


@pytest.mark.parametrize("strategies", [("ddp", "fsdp2"), pytest.param(("zero1",), marks=pytest.mark.slow)])
def test_a_step_takes_one_collective_more(strategies: tuple[str, ...], tmp_path: Path) -> None:
    """Bug: a round trip between the ranks for each tensor, each plugin, or each of the loss and the norm."""
    for rank in on_ranks(script.collectives_per_step, 2, tmp_path, strategies):
        for name, counts in rank.items():
            (bare,) = set(counts["bare"])
            assert max(sorted(counts["default"])[:-1]) <= bare + 1, name
            assert max(counts["default"]) <= bare + 2, name  # the weights are checked every 10 steps
