"""Each cell of the table in docs/strategies.md that says more than "not tried"."""

from pathlib import Path

import pytest
import strategy_features
from rank_pool import on_ranks
from strategy_features import ENTRIES, PAGE, Entry

QUICK = [("fsdp2", "skip")]


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(
            each,
            id=f"{each.strategy}-{each.feature}",
            marks=[] if (each.strategy, each.feature) in QUICK else [pytest.mark.slow],
        )
        for each in ENTRIES
    ],
)
def test_a_feature_works_or_is_refused(entry: Entry, tmp_path: Path) -> None:
    """Bug: a combination that is ignored without a word, or that the page describes wrongly."""
    if entry.feature == "8-bit":
        pytest.importorskip("bitsandbytes")
    found = on_ranks(strategy_features.run, entry.processes, tmp_path, entry, limit=300)
    if entry.refusal:
        assert all(entry.refusal in text for text in found), found
    else:
        assert not any(found), found


def test_the_page_shows_what_is_tested() -> None:
    """Bug: a table that a change has made wrong; run `python tests/helpers/strategy_features.py`."""
    text = PAGE.read_text(encoding="utf-8")
    assert strategy_features.page(text) == text
    assert len({(each.strategy, each.feature) for each in ENTRIES}) == len(ENTRIES)
