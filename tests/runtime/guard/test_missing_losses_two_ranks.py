"""A rank without a loss under DistributedDataParallel: the step is dropped on all ranks, as if never seen."""

from collections.abc import Callable
from pathlib import Path

import missing_losses_on_two_ranks as script
import pytest
import torch
from fits import assert_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(on_two_ranks: Callable[[str], Path]) -> Path:
    return on_two_ranks(script.__file__)


@pytest.mark.parametrize("name", script.CASES)
def test_a_step_without_a_loss_on_one_rank_is_never_seen(folder: Path, name: str) -> None:
    """Bugs: a crash; the other rank waits for ever; half a gradient is applied; ranks that differ; a zero taken for
    a loss; a step that the rules see; BatchNorm keeps what it saw; max_in_a_row ends a run that chose to leave out."""
    case = script.CASES[name]
    ranks = [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    steps = sorted({number // case.accumulate for number in case.missing})
    for rank, result in enumerate(ranks):
        dropped, never = result["dropped"], result["never seen"]
        assert_same(dropped["end"], never["end"])
        assert repr(dropped["outcomes"]) == repr(never["outcomes"])
        assert (dropped["skipped"], never["skipped"]) == (len(steps), 0)
        assert dropped["events"] == [(step, "guard", "skip") for step in steps]
        assert dropped["loss"] == never["loss"] or 5 in steps, "metrics of the last step"
        kept = {"none": [], "none after forward": [], "batch": [], "dict": ["loss", "n"]}.get(case.how, ["loss"])
        mine = case.missing if rank in case.ranks else ()
        assert dropped["outputs"] == [kept if n in mine else ["loss"] for n in range(script.STEPS * case.accumulate)]
    for key, value in ranks[0]["dropped"]["end"].items():
        if not key.startswith(("module.net.1.", "module.other", "scaler")):  # statistics are each rank's own
            assert torch.equal(value, ranks[1]["dropped"]["end"][key]), key


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_two_ranks_weigh_the_rest_of_an_epoch_alike(folder: Path, mode: str) -> None:
    """Bugs: a rank weighs its gradient before the ranks have averaged theirs, or by the micro-batches of all ranks."""
    ranks = [torch.load(folder / f"rest-{mode}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert repr(ranks[0]) == repr(ranks[1])
    (full, bare), (same, weighted) = ranks[0]
    assert full == same
    assert weighted[:2] == (bare[0], 2 * bare[1])
