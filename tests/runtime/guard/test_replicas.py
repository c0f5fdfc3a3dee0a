"""Ranks that would train different weights end with an error on all of them; no others do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import replicas_on_ranks
import torch
from rank_pool import on_ranks
from torch import nn

from stabletrain.runtime.guard.replicas import differ_by_rounding

NOT_AVERAGED = "nothing averages the gradient"
AT_START = "The ranks begin with different weights: "
AFTER_STEP = "The ranks have different weights after the first step: "
NO_EFFECT = "has changed neither parameters nor its own state"

EXPECTED = {
    "half": ([NOT_AVERAGED, "net.1.weight, net.1.bias, net.3.weight, net.3.bias on 2 ranks", "strategy=ddp"], 0),
    "nothing sharded": ([NOT_AVERAGED, "net.0.weight", "and 2 more", "fully_shard(self.net)"], 0),
    "unwrapped": ([NOT_AVERAGED, "Unwrapped", "averages_plain_gradients = True"], 0),
    "ignored": ([NOT_AVERAGED, "net.0.weight on 2 ranks"], 0),
    "unfrozen": ([NOT_AVERAGED, "net.0.weight, net.0.bias on 2 ranks", "require gradients from the start"], 3),
    "frozen differs": ([AT_START, "net.1.weight (ranks 0, 1) differs"], 0),
    "other seed": ([AT_START, "net.3.weight (ranks 0, 1) differs", "seed_everything"], 0),
    "leader without a word": ([AT_START, "net.3.weight (ranks 0, 1) differs"], 0),
    "static": (["static_graph=True", "windows of 2 micro-batches"], 0),
    "missing": ([AT_START, "more.weight (missing on rank 0), more.bias (missing on rank 0)"], 0),
    "partial": ([AFTER_STEP, "net.1.weight (ranks 0, 1) differs", "sum it over the group"], 0),
    "partial, warmup": ([AFTER_STEP, "net.1.weight (ranks 0, 1) differs"], 1),
    "partial, device": ([AFTER_STEP, "net.1.weight (ranks 0, 1) differs"], 1),
    "damaged": ([AFTER_STEP, "net.0.weight (ranks 0, 1) differs"], 0),
    "overlap": (["ZeroRedundancyOptimizer(overlap_with_ddp=True)", "overlap_with_ddp=False"], 0),
    "no step": ([NO_EFFECT, "ZeroRedundancyOptimizer.step()"], 0),
    "no step, sharded": ([NO_EFFECT, "NeverSteps.step()"], 0),
}
"""Words of the message, and applied steps before it; all other cases train to the end."""

EXPECTED_OF_FOUR = {
    "other seed": ([AT_START, "net.3.weight (rank 3) differs"], 0),
    "shards differ": ([AT_START, "net.0.weight (ranks 1, 3) differs"], 0),
}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_that_would_drift_apart(size: int, tmp_path: Path) -> None:
    """Bugs: ranks that end with different weights without a word, where nothing averages plain gradients, copies
    differ at the start, a gradient is partial, or a parameter is unfrozen after DDP was made; an optimizer that trains
    nothing; an error on one rank only, which the others wait for; an error where all is well."""
    ranks = on_ranks(replicas_on_ranks.fits, size, tmp_path, size)
    expected = EXPECTED if size == 2 else EXPECTED_OF_FOUR
    for name, (message, applied, weights) in ranks[0].items():
        for rank in ranks[1:]:
            assert rank[name][:2] == (message, applied), name
            assert all(map(torch.equal, rank[name][2], weights)), name
        if name in expected:
            words, steps = expected[name]
            assert all(word in message for word in words), f"{name}: {message}"
            assert applied == steps, name
        else:
            assert (message, applied) == ("", 12 if name == "tp" else 11), name  # elsewhere a NaN is dropped


def test_rounding_is_told_from_a_gradient_that_is_partial() -> None:
    """Bug: an error for kernels that add in any order, where ranks that see the same data differ in the last bits."""
    module = nn.Linear(3, 1)
    module.weight.grad = torch.ones(1, 3)

    def ranks(factor: float) -> Any:
        def max_each(numbers: list[float]) -> torch.Tensor:  # the other rank's norms are larger by the factor
            mine = torch.tensor(numbers, dtype=torch.float64)
            return torch.maximum(mine, torch.where(mine.abs() == 1.0, mine, mine * factor))

        return SimpleNamespace(max_each=max_each)

    names = ["weight", "bias"]
    assert differ_by_rounding(ranks(1 + 1e-6), module, names) == {"weight"}
    assert differ_by_rounding(ranks(1.4), module, names) == set()
