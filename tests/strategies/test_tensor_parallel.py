"""Real processes that share the layers of a small GPT, compared with a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tensor_parallel as cases
import torch
from rank_pool import on_ranks
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_ranks_equal(results: list[dict[str, Any]]) -> None:
    first, *others = results
    for other in others:
        assert str(first["outcomes"]) == str(other["outcomes"])  # NaN is NaN
        for name, weight in first["weights"].items():
            assert torch.equal(weight, other["weights"][name]), name


def assert_like_one_process(got: dict[str, Any], alone: dict[str, Any], steps: int) -> None:
    """Losses within 1e-5, norms within 1e-5 relative, the same steps skipped and clipped."""
    for mine, theirs in list(zip(got["outcomes"], alone["outcomes"], strict=True))[:steps]:
        assert mine[5] == theirs[5], (mine, theirs)
        if not mine[5]:
            assert mine[1] == pytest.approx(theirs[1], abs=1e-5)
            assert mine[2:5] == pytest.approx(theirs[2:5], rel=1e-5)


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Bugs: wrong logits or partial gradients; norms that count a rank's part, or a whole parameter twice; a NaN that
    one rank sees is skipped there only; ranks that drift apart."""
    options = {"qk_norm": True, "tie_embeddings": True, "nan_at": (3, 0)}
    alone = cases.train(tmp_path, None, 1, options)
    got = on_ranks(cases.train_on_ranks, 2, tmp_path, "tensor_parallel", 2, {**options, "nan_at": (3, 1)})
    assert_ranks_equal(got)
    assert [each[5] for each in got[0]["outcomes"]] == [i == 3 for i in range(cases.BATCHES)]
    assert any(each[4] < each[2] for each in got[0]["outcomes"])  # clipped
    assert_like_one_process(got[0], alone, 10)
