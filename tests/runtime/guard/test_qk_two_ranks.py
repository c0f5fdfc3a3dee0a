"""Query and key weights on two ranks: copies (DDP) and shards that divide a head (FSDP2)."""

from pathlib import Path

import pytest
import torch
from fits import assert_same
from qk_on_ranks import clipped
from rank_pool import on_ranks


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_weights_are_scaled_by_the_largest_logit_of_all_ranks(kind: str, tmp_path: Path) -> None:
    """Bugs: each rank scales by its own logits, so that copies differ; rows of a shard get another head's factor; a
    step that both ranks drop, because one has a NaN, scales."""
    (one, _), (two, _) = on_ranks(clipped, 2, tmp_path, kind, 0.0)
    assert_same(one, two)
    (alone, without), *_ = on_ranks(clipped, 1, tmp_path, None, 0.0)
    assert not torch.allclose(alone["net.q.weight"][:4], without["net.q.weight"][:4], rtol=0.1)
    for key, weight in alone.items():
        torch.testing.assert_close(one[key], weight, rtol=1e-5, atol=0)
    assert torch.equal(one["net.q.weight"][4:], without["net.q.weight"][4:])
