"""A fault on one rank of two: it spreads as a real one does, and both ranks decide alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "helpers" / "faults_on_two_ranks.py"


@pytest.fixture(scope="module")
def folder(on_two_ranks: Callable[[Path], Path]) -> Path:
    return on_two_ranks(SCRIPT)


@pytest.mark.parametrize(
    ("name", "skipped", "changes"),
    [("nan_grad", [2], True), ("nan_loss", [2], True), ("bad_batch", [], True), ("slow_rank", [], False)],
)
def test_both_ranks_end_with_the_same_weights(folder: Path, name: str, skipped: list[int], changes: bool) -> None:
    """Bugs: a gradient changed after the reduction, so that ranks diverge; a decision of one rank, which hangs."""
    ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    plain = torch.load(folder / "none-0.pt", weights_only=True)
    assert [rank["skipped"] for rank in ranks] == [skipped, skipped]
    for key, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][key])
        assert torch.equal(weight, plain["weights"][key]) is not changes
