"""Two ranks that step by hand decide as one process, for each optimizer."""

from collections.abc import Callable
from pathlib import Path

import manual_on_two_ranks as script
import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(on_two_ranks: Callable[[str], Path]) -> Path:
    return on_two_ranks(script.__file__)


@pytest.mark.parametrize("case", ["gan", "ddp", "fsdp2"])
def test_two_ranks_decide_as_one_process(folder: Path, case: str, tmp_path: Path) -> None:
    """Bugs: a hang; a loss that is found on one rank only, as with sharded gradients; an optimizer that is skipped on
    the rank of the NaN alone."""
    ranks = [torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for mine, theirs in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True):
        assert torch.equal(mine, theirs)
    assert repr(ranks[0]["outcomes"]) == repr(ranks[1]["outcomes"])
    alone = script.train_gan(tmp_path, False) if case == "gan" else script.train_split(tmp_path, None)
    assert ranks[0]["global_step"] == alone["global_step"]
    for ours, single in zip(ranks[0]["outcomes"], alone["outcomes"], strict=True):
        assert [o[3:] for o in ours] == [o[3:] for o in single]
        assert [o[:3] for o in ours] == [pytest.approx(o[:3], rel=1e-4, nan_ok=True) for o in single]
    skipped = [sum(o[3] for o in each) for each in alone["outcomes"]]
    assert skipped == ([0, 1] if case == "gan" else [1, 1])
    for ours, single in zip(ranks[0]["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(ours, single, rtol=1e-4, atol=1e-5)
