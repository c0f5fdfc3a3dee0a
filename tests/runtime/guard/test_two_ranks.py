"""Two ranks decide as one: a NaN on one of them, sharded gradients, losses averaged over ranks and micro-batches."""

from collections.abc import Callable
from pathlib import Path

import dropped_on_two_ranks
import guard_on_two_ranks as script
import pytest
import torch
import two_ranks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(on_two_ranks: Callable[[str], Path]) -> Path:
    return on_two_ranks(script.__file__)


@pytest.mark.parametrize("case", script.CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_ranks_decide_as_one_process(folder: Path, case: tuple[str, str, int], tmp_path: Path) -> None:
    """Bugs: a hang; ranks that skip apart; a rank's own loss or a shard's norm; a skip that moves a shard."""
    ranks = [torch.load(folder / f"{'-'.join(map(str, case))}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for mine, theirs in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True):
        assert torch.equal(mine, theirs)
    assert repr(ranks[0]["outcomes"]) == repr(ranks[1]["outcomes"])
    alone = script.train(tmp_path, None, *case[1:])
    assert ranks[0]["global_step"] == alone["global_step"] == two_ranks.BATCHES // case[2] - 1
    assert [o[2:] for o in ranks[0]["outcomes"]] == [o[2:] for o in alone["outcomes"]]
    assert any(clipped for *_, clipped in alone["outcomes"])
    for ours, single in zip(ranks[0]["outcomes"], alone["outcomes"], strict=True):
        assert ours[:2] == pytest.approx(single[:2], rel=1e-4, nan_ok=True)
    for ours, single in zip(ranks[0]["weights"], alone["weights"], strict=True):
        torch.testing.assert_close(ours, single, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def dropped(on_two_ranks: Callable[[str], Path]) -> Path:
    return on_two_ranks(dropped_on_two_ranks.__file__)


@pytest.mark.parametrize("case", dropped_on_two_ranks.CASES)
def test_an_event_names_the_samples_of_both_ranks(dropped: Path, case: str) -> None:
    """Bugs: only those of rank 0, which were fine, or of each rank alone where a checkpoint is saved; a hang."""
    ranks = [torch.load(dropped / f"{case}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    mine, theirs = (rank["bad"] for rank in ranks)
    assert mine != theirs
    assert [rank["events"] for rank in ranks] == [[(two_ranks.NAN_AT, "nonfinite", (mine, theirs))]] * 2


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_two_ranks_tolerate_and_drop_as_one_process(folder: Path, mode: str, tmp_path: Path) -> None:
    """Bugs: the rank that sees the outlier counts it alone, and drops the second one alone; ranks clip to limits of
    their own."""
    ranks = [torch.load(folder / f"outliers-{mode}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert repr(ranks[0]["outcomes"]) == repr(ranks[1]["outcomes"])
    alone = script.train_outliers(tmp_path, None, mode)["outcomes"]
    for mine, theirs in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True):
        assert torch.equal(mine, theirs)
    for outcomes in (ranks[0]["outcomes"], alone):
        assert [step for step, (_, _, skipped) in enumerate(outcomes) if skipped] == [script.GARBAGE_AT + 1]
        norm, applied, _ = outcomes[script.GARBAGE_AT]
        assert applied < norm / 3
    for ours, single in zip(ranks[0]["outcomes"], alone, strict=True):
        assert ours[:2] == pytest.approx(single[:2], rel=1e-3, nan_ok=True)


def test_two_ranks_tell_a_bad_batch_from_an_overflow_as_one_process(folder: Path, tmp_path: Path) -> None:
    """Bug: fp16, a NaN gradient on one rank: one rank lowers its loss scale or steps, the other drops the batch."""
    ranks = [torch.load(folder / f"fp16-{rank}.pt", weights_only=True) for rank in (0, 1)]
    for mine, theirs in zip(ranks[0]["weights"], ranks[1]["weights"], strict=True):
        assert torch.equal(mine, theirs)
    assert ranks[0]["outcomes"] == ranks[1]["outcomes"] == script.train_fp16(tmp_path, None)["outcomes"]
    _, skipped, overflows, _ = zip(*ranks[0]["outcomes"], strict=True)
    assert sum(overflows) >= 3
    assert sum(skipped) >= 3 + 2, "bad gradients, besides the bad losses"
