"""A change that one rank of two announces is in force on both, at the same step, as in one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import announce_on_two_ranks as script
import pytest
import torch
from announced import TERM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(on_two_ranks: Callable[[str], Path]) -> Path:
    return on_two_ranks(script.__file__)


@pytest.mark.parametrize("case", script.CASES, ids="-".join)
def test_one_rank_announces_for_both(folder: Path, case: tuple[str, str, str], tmp_path: Path) -> None:
    """Bugs: ranks that skip apart, or hang; a change in force a step late on the other rank, whose limits are on the
    device already; an announcement missing in the checkpoint because rank 0, which writes it, had not heard of it."""
    ranks: list[dict[str, Any]] = [
        torch.load(folder / f"{'-'.join(case)}-{rank}.pt", weights_only=True) for rank in (0, 1)
    ]
    alone = script.train(tmp_path, None, *case[1:])
    silent = case[2] == "none"
    saves = case[0] == "ddp"
    for result in (*ranks, alone):
        assert any(result["skipped"]) == silent
        assert result["learned"] == (8 if silent else 4)
        if result["saved"] is not None:
            assert result["saved"] == (0 if case[2] == "on_train_batch_end" else 8)
    assert (ranks[0]["saved"] is not None) == saves
    assert alone["announced"] == ranks[1]["announced"] == ([] if silent else [(script.AT, TERM)])
    assert ranks[0]["announced"] == ([] if silent else [(script.AT, "announced on another rank")])
    assert ranks[0]["losses"] == ranks[1]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    for mine, theirs, single in zip(*(result["weights"] for result in (*ranks, alone)), strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, single, rtol=1e-4, atol=1e-5)
