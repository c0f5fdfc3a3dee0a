"""Two ranks restore together, with DDP, FSDP2 and ZeRO: bit-identical when no batches are excluded."""

from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "helpers" / "going_back_on_two_ranks.py"


@pytest.mark.slow
def test_two_ranks_go_back_together(on_two_ranks: Callable[[Path], Path]) -> None:
    """Bugs: a rank that waits for the other; a shard that is not restored; ranks that exclude different batches."""
    folder = on_two_ranks(SCRIPT)
    assert len((folder / "passed.txt").read_text().splitlines()) == 11
