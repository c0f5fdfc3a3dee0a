"""Options of ``optimizer`` on sharded parameters: equal to one process, or refused before the first step."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import sharded_optimizers_on_two_ranks as script
import torch
from fits import HEALTHY, Net, batches, fit
from torch import nn

from stabletrain import SkipNonFinite, UserError
from stabletrain.runtime.guard import sharded_optimizers

EXACT = (
    "adam", "adamw", "adamw_kahan", "adamw_schedulefree", "ademamix", "lion", "lion_kahan", "momentum", "muon", "nadam",
    "nesterov", "radam", "rmsprop", "sgd_schedulefree",
)  # fmt: skip
ROUNDED = {"stable_adamw_kahan": 1e-7, "adamw_8bit_ao": 1e-3, "adamw_fp8_ao": 1e-3}
"""A norm is summed in another order; blocks of 8-bit state end where a shard ends."""


@pytest.mark.slow
def test_every_option_equals_one_process_or_is_refused(on_two_ranks: Callable[[str], Path]) -> None:
    """Bugs: an error of DTensor from within the first step; a message that recommends what fails as well."""
    found = {
        each.pop("option"): each for each in json.loads((on_two_ranks(script.__file__) / "sharded.json").read_text())
    }
    for name, result in found.items():
        if name.endswith("_ao") and os.environ.get("TORCHDYNAMO_DISABLE") != "1":
            continue  # not installed, or compiled for minutes
        if "refused" in result:
            continue
        assert "error" not in result, f"{name}: {result}"
        limit = 0.0 if name in EXACT else ROUNDED[name]
        assert result["weight"] <= limit, f"{name}: {result}"
        assert result["loss"] <= limit, f"{name}: {result}"
    refused = {name for name in found if "refused" in found[name] and not name.endswith("_ao")}
    assert refused == {*found} - {*EXACT} - {*ROUNDED}
    assert all(f"optimizer={name} " not in found[other]["refused"] for name in refused for other in refused)


def test_the_guard_refuses_at_the_start_of_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: nobody calls the check; a class derived from one that fails, as ours of bitsandbytes, is let through."""
    monkeypatch.setattr(sharded_optimizers, "DTensor", nn.Parameter)
    items = batches(HEALTHY)
    with pytest.raises(UserError, match=r"AdamW8bit cannot train sharded.*optimizer=adamw_8bit_ao"):
        fit(Net("adamw-8bit"), items, SkipNonFinite())
    with pytest.raises(UserError, match=r"SGD\(fused=True\) cannot.*fused=False"):
        fit(Net("sgd-fused"), items, SkipNonFinite())
    fit(Net("adamw-fused"), items, SkipNonFinite())
    fit(Net("sgd-momentum"), items, SkipNonFinite())

    class Mine(torch.optim.Adafactor):
        pass

    with pytest.raises(UserError, match=r"Mine cannot train sharded.*optimizer=adamw"):
        sharded_optimizers.check_sharded([Mine([nn.Parameter(torch.zeros(2, 2))])])
