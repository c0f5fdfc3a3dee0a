"""What several processes agree on, and which parameters nothing keeps equal on them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks_on_two_ranks as script
import torch
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch.strategies import FSDPStrategy
from rank_pool import on_ranks

from stabletrain.runtime.guard.measurement import add_up
from stabletrain.runtime.ranks import Ranks


def test_one_process_makes_no_collective_call() -> None:
    """Bugs: a mean that is not the only loss itself; an empty window taken for a NaN; a warning of drifting copies."""
    ranks = Ranks(fit(Net(), batches(HEALTHY)))
    loss = torch.tensor(0.1)
    gradient = torch.tensor([3.0, 4.0])
    assert add_up(ranks, [loss], None, [])[0] is loss
    assert add_up(ranks, [torch.tensor(1.0), torch.tensor(2.0)], None, [gradient])[:3] == (1.5, 5.0, 2)
    assert add_up(ranks, [torch.tensor(1.0), torch.tensor(2.0)], [0.5, 1.5], [])[:3] == (1.5, 0.0, 2.0)
    assert add_up(ranks, [], None, [])[0] is None
    assert [add_up(ranks, losses, None, [], True, False).flags for losses in ([], [loss])] == [[True, False]] * 2
    assert (ranks.any(True), ranks.any(False)) == (True, False)
    assert ranks.placement(next(Net().parameters())) == "replicated"


@pytest.mark.parametrize(
    ("strategy", "placement"),
    [
        (FSDPStrategy(), "sharded"),
        (SimpleNamespace(averages_plain_gradients=True), "replicated"),
        (SimpleNamespace(averages_plain_gradients=False), "local"),
        (SimpleNamespace(model=Net()), "local"),
    ],
)
def test_a_strategy_is_asked_who_averages(strategy: Any, placement: str) -> None:
    """Bugs: an error where the first FSDP shards parameters or a strategy averages them itself; plain parameters taken
    for replicas where nothing averages them."""
    ranks = Ranks(SimpleNamespace(strategy=strategy, world_size=2, is_global_zero=True))  # type: ignore[arg-type]
    assert ranks.placement(torch.nn.Parameter(torch.ones(2))) == placement


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Bugs: a rank without a loss that the others wait for for ever; its silence counted as a loss of 0; a NaN or a
    flag that one rank alone sees; equal copies of tensor parallel ranks, which see the same data, taken for others."""
    for found in on_ranks(script.train, 2, tmp_path):
        for name, result in found.items():
            assert result["one_has_none"] == 4.0
            assert result["none_has_one"] is True
            assert result["nan_on_one"] == "nan"
            assert result["weighted"] == (2.0, 9.0)
            assert result["norms"] == ["5.0", "0.0", "nan"]
            assert result["mean_square"] == pytest.approx(12.5)  # the other rank has no gradient
            assert result["flags"] == [[], [0.0, 1.0, 2.0], [1.0]]
            assert result["any"] == [True, False]
            kinds = result["placements"]
            assert kinds["net.0.weight"] == ("replicated" if name in ("ddp", "tp") else "sharded")
            assert kinds["net.3.bias"] == ("sharded" if name == "fsdp2" else "replicated")
