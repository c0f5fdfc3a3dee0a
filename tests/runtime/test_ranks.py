"""What several processes agree on, and which parameters nothing keeps equal on them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks_on_two_ranks as script
import torch
from fits import HEALTHY, Net, batches, fit

from stabletrain.runtime.ranks import Ranks


def test_one_process_makes_no_collective_call() -> None:
    """Bugs: a mean that is not the only loss itself; an empty window taken for a NaN; a warning of drifting copies."""
    ranks = Ranks(fit(Net(), batches(HEALTHY)))
    loss = torch.tensor(0.1)
    assert ranks.mean_loss([loss]) is loss
    assert ranks.mean_loss([torch.tensor(1.0), torch.tensor(2.0)]) == 1.5
    assert ranks.mean_loss([]) is None
    assert (ranks.any(True), ranks.any(False)) == (True, False)
    assert ranks.local_parameters(Net().named_parameters()) == []


@pytest.mark.slow
def test_two_processes(on_two_ranks: Callable[[str], Path]) -> None:
    """Bugs: a rank without a loss that the others wait for for ever; its silence counted as a loss of 0; a NaN that one
    rank alone sees; plain parameters beside sharded ones, which nobody averages, taken for replicas."""
    folder = on_two_ranks(script.__file__)
    for name in ("ddp", "fsdp2", "half"):
        results = [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        for result in results:
            assert result["one_has_none"] == 4.0
            assert result["none_has_one"] is True
            assert result["nan_on_one"] == "nan"
            assert result["any"] == [True, False]
            kinds = result["placements"]
            assert kinds["net.0.weight"] == ("replicated" if name == "ddp" else "sharded")
            assert kinds["net.3.bias"] == {"ddp": "replicated", "fsdp2": "sharded", "half": "local"}[name]
        warned = [len(result["warned"]) for result in results]
        assert warned == ([1, 0] if name == "half" else [0, 0])
        if name == "half":
            assert "net.1.weight, net.1.bias, net.3.weight, net.3.bias" in results[0]["warned"][0]
