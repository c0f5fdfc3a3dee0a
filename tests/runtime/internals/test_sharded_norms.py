"""Norms of sharded gradients are those of the whole ones, and take one collective for each mesh."""

import math
from pathlib import Path

import norms_on_ranks
import pytest
import torch
from rank_pool import on_ranks

from stabletrain.runtime import gradients

COLLECTIVES = {"replicas": 1, "pending": 2, "2-d and a part": 2}
"""For all others 1: the sum of squares. A pending sum is carried out first."""
OF_SHARE = {"pending": 1, "mesh of some ranks": 1, "2-d and a part": 1}
"""For all others 0: the caller adds up the squares of all ranks."""


@pytest.mark.parametrize("size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_every_kind_of_shard(size: int, tmp_path: Path) -> None:
    """Bugs: norms of shards instead of tensors; copies on a mesh's other dimension counted twice; a collective for each
    tensor; a rank with an empty shard that hangs; a NaN or Inf that one rank alone sees, or that vanishes."""
    ranks = on_ranks(norms_on_ranks.norms, size, tmp_path)
    whole = norms_on_ranks.whole_tensors()
    expected, each_expected = gradients.global_norm(whole), gradients.tensor_norms(whole)
    poisoned = [rank.pop("poisoned") for rank in ranks]
    for name, (norm, each, from_shares, (of_global, of_tensors, of_share)) in ranks[0].items():
        torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(each, each_expected, rtol=1e-6, atol=0, msg=name)
        torch.testing.assert_close(from_shares, expected, rtol=1e-6, atol=0, msg=name)
        assert of_global == of_tensors == COLLECTIVES.get(name, 1), name
        assert of_share == OF_SHARE.get(name, 0), name
        for rank in ranks[1:]:
            assert torch.equal(rank[name][0], norm), name
            assert torch.equal(rank[name][1], each), name
            assert torch.equal(rank[name][2], from_shares), name
    for rank in poisoned:
        for value, norm, each in rank:
            assert math.isnan(norm) if math.isnan(value) else norm == math.inf
            assert (~each.isfinite()).sum() == 1


def test_twenty_tensors_take_one_collective(tmp_path: Path) -> None:
    """Bug: one collective for each tensor, of which each costs a round trip."""
    for counted, norm, whole in on_ranks(norms_on_ranks.collectives_of_a_model, 2, tmp_path):
        assert counted == 1
        assert norm == pytest.approx(whole, rel=1e-6)
