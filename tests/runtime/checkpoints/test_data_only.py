"""State of an optimizer that no checkpoint can hold as data is named when it is saved, and not when it is read."""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, Net, SaveAfter, batches, fit
from torch import nn
from torch.optim import SGD, Optimizer

from stabletrain import ResumeExactly, SaveCheckpoints, UserError
from stabletrain.runtime.checkpoints.data_only import refused_in


class Projector:
    """As GaLore's, which pytorch-optimizer's Conda keeps in its state."""

    def __init__(self) -> None:
        self.matrix = torch.ones(2)


class Projecting(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("projector", Projector())
        return super().step(closure)


class Projected(Net):
    def configure_optimizers(self) -> Optimizer:
        return Projecting(self.parameters(), 0.1)


def test_what_torch_refuses_is_found(tmp_path: Path) -> None:
    # catches a state that is called readable and is not, and the reverse
    p = nn.Parameter(torch.ones(2))
    good = {"a": [p, torch.ones(1), (1, None, "x", math.nan)], 3: OrderedDict(b={1.5}), "c": torch.float32}
    assert refused_in({"state": good}) is None
    assert refused_in({"state": {0: {"q": [Projector()]}}}) == ("state.0.q.0", f"{__name__}.Projector")
    file = tmp_path / "x.ckpt"
    for value in (defaultdict(int), frozenset({1}), torch.Generator):
        torch.save(value, file)
        try:
            torch.load(file, weights_only=True)
        except pickle.UnpicklingError:
            is_refused = True
        else:
            is_refused = False
        assert (refused_in({"x": value}) is not None) is is_refused


def test_it_is_named_at_the_first_save(tmp_path: Path) -> None:
    # catches a checkpoint that is written without a word and cannot be resumed from
    items = batches(*[HEALTHY] * 3)
    with pytest.raises(UserError, match=r"optimizer Projecting cannot be saved.*optimizer_states\.0\..*projector is a"):
        fit(Projected(), items, SaveCheckpoints(tmp_path, 1, on_sigterm=False))
    with pytest.warns(UserWarning, match=r"Projecting holds a .*Projector \(state\.0\.projector\).*weights_only=False"):
        fit(Projected(), items, ResumeExactly(), SaveAfter(1, tmp_path / "one.ckpt"))
