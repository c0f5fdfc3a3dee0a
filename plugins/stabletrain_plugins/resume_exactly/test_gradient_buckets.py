"""Three ranks under DDP resume bit for bit: each adds its gradients in the order of the uninterrupted run."""

from pathlib import Path

import buckets_on_ranks
import pytest
from rank_pool import on_ranks

from stabletrain_plugins.resume_exactly.gradient_buckets import checked


def test_three_ranks_resume(tmp_path: Path) -> None:
    """Bugs: the first resumed step averages in DDP's initial buckets, also after the very first step and in a run that
    was itself resumed; the plugin changes the bits of a run that is not resumed; a checkpoint of an earlier version is
    refused; buckets that do not fit are taken without a word, or end the fit."""
    frozen = on_ranks(buckets_on_ranks.resumed, 3, tmp_path, limit=300)[0]
    [warning] = [each for each in frozen if "buckets" in each]
    assert "other parameters are trained than at the checkpoint" in warning
    assert "may differ in the last bits" in warning


@pytest.mark.slow
def test_all_kinds_of_buckets(tmp_path: Path) -> None:
    """Bugs: a bucket for each type mixed up; gradients that are views of the old buckets; a checkpoint within an
    accumulation window; the layout of ``static_graph``; initial buckets that DDP keeps in another order."""
    on_ranks(buckets_on_ranks.kinds, 3, tmp_path, limit=400)


@pytest.mark.parametrize("wrong", [{}, ["a"], [[1]], None])
def test_damaged(wrong: object) -> None:
    """Bug: a damaged checkpoint fails deep within DDP, after the run has started."""
    with pytest.raises(TypeError, match="names of parameters"):
        checked(wrong)
