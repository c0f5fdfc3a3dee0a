"""SetPrecision under DistributedDataParallel."""

from collections.abc import Callable
from pathlib import Path

import precision_on_two_ranks as script
import pytest
import torch


@pytest.mark.slow
def test_an_overflow_on_one_rank_lets_both_fall_back(on_two_ranks: Callable[[str], Path]) -> None:
    """Bug: one rank computes in fp16 and the other in bfloat16, at different scales."""
    result = torch.load(on_two_ranks(script.__file__) / "result.pt", weights_only=True)
    half, low = "torch.float16", "torch.bfloat16"
    assert result["same"]
    assert result["formats"] == [half] * 5 + [low] * 3 + [half] * 4
    assert result["steps"] == 10
