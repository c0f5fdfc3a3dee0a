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


@pytest.mark.parametrize("name", script.NOBODY)
def test_without_a_loss_on_any_rank_training_is_lightnings(folder: Path, name: str) -> None:
    """Bugs: a module that has no loss until its buffers are full never fills them; weight decay by gradients of zero;
    a schedule that stands still; a loss scale that grows for it; a rule that sees a loss of 0."""
    case = script.NOBODY[name]
    steps = len(case.missing) // case.accumulate
    for rank in (0, 1):
        result = torch.load(folder / f"nobody-{name}-{rank}.pt", weights_only=True)
        end, bare = result["end"], result["bare"]
        assert (result["skipped"], result["attempted"], result["events"]) == (steps, script.STEPS, [])
        assert len(result["outcomes"]) == script.STEPS - steps
        assert end["global_step"] == script.STEPS
        if bare is None:
            assert end["scaler._growth_tracker"] == (script.STEPS - steps) % 3
        elif case.how in ("leaf", "none after forward"):
            assert_same(end, bare)
        else:  # there the forward pass of these batches is missing, too
            for key in [key for key in end if "num_batches" not in key and "running" not in key]:
                # after a window without gradients Lightning's next micro-batch is averaged alone: a rounding
                close = {"rtol": 1e-5, "atol": 1e-7} if case.accumulate > 1 else {"rtol": 0.0, "atol": 0.0}
                torch.testing.assert_close(end[key], bare[key], **close, msg=key)


def test_a_zero_without_a_graph_within_a_window_is_lightnings(folder: Path) -> None:
    """Bug: a window is dropped where no rank has to wait, and training differs from that without plugins."""
    for rank in (0, 1):
        result = torch.load(folder / f"nobody-in window-{rank}.pt", weights_only=True)
        assert_same(result["end"], result["bare"])
        assert result["skipped"] == 0


@pytest.mark.parametrize("mode", ["exact", "device"])
def test_two_ranks_weigh_the_rest_of_an_epoch_alike(folder: Path, mode: str) -> None:
    """Bugs: a rank weighs its gradient before the ranks have averaged theirs, or by the micro-batches of all ranks."""
    ranks = [torch.load(folder / f"rest-{mode}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert repr(ranks[0]) == repr(ranks[1])
    (full, bare), (same, weighted) = ranks[0]
    assert full == same
    assert weighted[:2] == (bare[0], 2 * bare[1])


def test_a_run_resumed_after_such_a_step_equals_the_uninterrupted_one(folder: Path) -> None:
    """Bugs: counts that begin again; a rollback's record, or a rule's history, that has lost its place in the data."""
    for rank in (0, 1):
        result = torch.load(folder / f"resumed-{rank}.pt", weights_only=True)
        whole, resumed = result["whole"], result["resumed"]
        assert_same(resumed["end"], whole["end"])
        assert resumed["skipped"] == whole["skipped"] >= 2
        assert resumed["states"] == whole["states"]
