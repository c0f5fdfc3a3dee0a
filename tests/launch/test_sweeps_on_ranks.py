"""Decisions of a range test and of a trial are those of all ranks."""

import math
from pathlib import Path

import pytest
import sweeps_on_ranks
import torch
from rank_pool import on_ranks

pytest.importorskip("optuna")


@pytest.mark.slow
def test_all_ranks_end_a_range_test_and_a_trial_together(tmp_path: Path) -> None:
    """Bugs: one rank ends and the others wait for it for ever; each rank writes the file, or opens the study."""
    (steps, losses, weights), (other_steps, other_losses, other_weights) = on_ranks(
        sweeps_on_ranks.range_test, 2, tmp_path
    )
    assert steps == other_steps < 60
    assert len(losses) >= steps
    assert other_losses == []
    assert any(math.isnan(loss) for loss in losses), "a NaN on one rank is everyone's"
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight.nan_to_num(0), other_weights[name].nan_to_num(0))
    assert on_ranks(sweeps_on_ranks.trial, 2, tmp_path) == ["val/loss is nan at step 6"] * 2
