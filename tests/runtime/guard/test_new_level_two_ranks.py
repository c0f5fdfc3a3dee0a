"""Two ranks, of which one alone sees a new level or an outlier, decide as one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import new_level_on_two_ranks as script
import pytest
import torch
from fits import assert_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(on_two_ranks: Callable[[str], Path]) -> Path:
    return on_two_ranks(script.__file__)


@pytest.mark.parametrize("case", script.CASES, ids="-".join)
def test_one_rank_sees_it(folder: Path, case: tuple[str, str], tmp_path: Path) -> None:
    """Bugs: a hang; ranks that roll back, accept, drop or exclude apart; the level of one rank learned instead of the
    mean's."""
    mine, theirs = (torch.load(folder / f"{'-'.join(case)}-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert_same(mine.pop("end"), theirs.pop("end"))
    assert mine == theirs
    alone = script.run(tmp_path, *case, ranks=1)
    for field in ("decisions", "skipped", "seen", "excluded", "given_back"):
        assert mine[field] == alone[field], field
    expected = ["rewarm", "rollback", "rewarm", "accept"] if case[0] == "level" else []
    assert [kind for _, kind in alone["decisions"]] == expected
    assert alone["skipped"]
