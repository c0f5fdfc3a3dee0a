"""Activations that are computed again, against the same run that keeps them."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, Net, assert_same, batches, everything, fit
from torch import nn

from stabletrain import CheckpointActivations, SkipNonFinite, UserError

ITEMS = batches(*[HEALTHY] * 3, NAN_LOSS, *[HEALTHY] * 2)


class Block(nn.Module):
    """With running statistics, dropout and a buffer that its own forward pass reads and changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: Any, *, slope: float = 1.0) -> Any:
        y = self.drop(self.norm(self.linear(x)).tanh()) * self.level.clone() * slope
        self.level.mul_(0.9)
        return x + y


class Deep(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(*[Block() for _ in range(4)]), nn.Linear(6, 1))


@pytest.mark.parametrize("arguments", [{}, {"every": 2}, {"blocks": r"net\.0\.[13]"}, {"blocks": "net"}])
@pytest.mark.parametrize("options", [{}, {"fp16": True}, {"accumulate_grad_batches": 2}])
def test_it_is_exact(arguments: Any, options: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: statistics count twice; the second pass has other masks or reads buffers that the first has changed; the
    measurement leaves a trace; the module keeps the replaced forward pass."""
    ends = []
    for plugins in ([], [CheckpointActivations(**arguments)]):
        torch.manual_seed(5)
        module = Deep()
        with caplog.at_level(logging.INFO, "stabletrain"):
            trainer = fit(module, ITEMS, SkipNonFinite(), *plugins, **options)
        ends.append({**everything(trainer), "next": torch.rand(1)})
        assert not any("forward" in vars(each) for each in module.modules())
    assert_same(*ends)
    (said,) = [r.getMessage() for r in caplog.records if "computed again" in r.getMessage()]
    assert "MB less is kept" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"blocks": "nets"}, "no module is chosen by 'nets'.* net.0.0"),
        ({"blocks": r"net.*"}, "lies within"),
        ({"blocks": "("}, "blocks must be a regular expression"),
        ({"every": 0}, "every must be"),
    ],
)
def test_mistakes(arguments: Any, says: str, tmp_path: Path) -> None:
    """Bug: nothing is checkpointed, without a word."""
    with pytest.raises(UserError, match=says):
        fit(Deep(), ITEMS, CheckpointActivations(**arguments))
