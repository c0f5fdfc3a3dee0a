"""What several processes agree on, and which parameters nothing keeps equal on them."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks_on_two_ranks as script
import torch
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch.strategies import FSDPStrategy

from stabletrain.runtime.ranks import Ranks


def test_one_process_makes_no_collective_call() -> None:
    """Bugs: a mean that is not the only loss itself; an empty window taken for a NaN; a warning of drifting copies."""
    ranks = Ranks(fit(Net(), batches(HEALTHY)))
    loss = torch.tensor(0.1)
    assert ranks.mean_loss([loss])[0] is loss
    assert ranks.mean_loss([torch.tensor(1.0), torch.tensor(2.0)])[0] == 1.5
    assert ranks.mean_loss([])[0] is None
    assert [ranks.mean_loss(losses, True, False)[1] for losses in ([], [loss])] == [[True, False]] * 2
    assert (ranks.any(True), ranks.any(False)) == (True, False)
    assert ranks.local_parameters(Net().named_parameters()) == []


@pytest.mark.parametrize(("strategy", "placement"), [(FSDPStrategy(), "sharded"), (SimpleNamespace(), "replicated")])
def test_other_strategies_give_no_false_alarm(strategy: Any, placement: str) -> None:
    """Bug: a warning that copies drift apart, where the first FSDP shards them or a strategy averages them itself."""
    ranks = Ranks(SimpleNamespace(strategy=strategy, world_size=2, is_global_zero=True))  # type: ignore[arg-type]
    assert ranks.placement(torch.nn.Parameter(torch.ones(2))) == placement


@pytest.mark.slow
def test_two_processes(on_two_ranks: Callable[[str], Path]) -> None:
    """Bugs: a rank without a loss that the others wait for for ever; its silence counted as a loss of 0; a NaN or a
    flag that one rank alone sees; plain parameters beside sharded ones, which nobody averages, taken for replicas;
    equal copies of tensor parallel ranks, which see the same data, warned of."""
    folder = on_two_ranks(script.__file__)
    for name in ("ddp", "fsdp2", "half", "tp"):
        results = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for result in results:
            assert result["one_has_none"] == 4.0
            assert result["none_has_one"] is True
            assert result["nan_on_one"] == "nan"
            assert result["flags"] == [[], [0.0, 1.0, 2.0], [1.0]]
            assert result["any"] == [True, False]
            kinds = result["placements"]
            assert kinds["net.0.weight"] == ("replicated" if name in ("ddp", "tp") else "sharded")
            last = {"ddp": "replicated", "fsdp2": "sharded", "half": "local", "tp": "replicated"}
            assert kinds["net.3.bias"] == last[name]
        warned = [len(result["warned"]) for result in results]
        assert warned == ([1, 0] if name == "half" else [0, 0])
        if name == "half":
            assert "net.1.weight, net.1.bias, net.3.weight, net.3.bias" in results[0]["warned"][0]
