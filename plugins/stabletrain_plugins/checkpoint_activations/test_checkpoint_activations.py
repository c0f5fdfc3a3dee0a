"""Activations that are computed again, against the same run that keeps them."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, Net, assert_same, batches, everything, fit
from torch import nn

from stabletrain import CheckpointActivations, SkipNonFinite, UserError
from stabletrain.testing.trainer import quiet_trainer

ITEMS = batches(*[HEALTHY] * 3, NAN_LOSS, *[HEALTHY] * 2)


class Block(nn.Module):
    """With running statistics, dropout, and state that its own forward pass reads and changes: a buffer, a tensor in an
    attribute, another one in place, a counter, and a cache that is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)
        self.register_buffer("level", torch.ones(()))
        self.calls, self.hidden, self.mean = 0, torch.zeros(6), [torch.zeros(())]

    def forward(self, x: Any, cache: Any = None, *, slope: float = 1.0) -> Any:
        y = self.drop(self.norm(self.linear(x)).tanh()) * self.level.clone() * slope
        self.level.mul_(0.9)
        y = y + 0.1 * self.hidden * self.calls + 0.1 * self.mean[0].clone()
        self.calls += 1
        self.hidden = 0.5 * self.hidden + x.detach().mean(0).float()
        self.mean[0].add_(0.01)
        return x + (y if cache is None else cache.update(y))


class Cache:
    """As that of keys and values of a transformer: holds what blocks have added, and grows."""

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.counts = {"calls": 0}

    def update(self, y: Any) -> Any:
        self.layers.append(y.mean())
        self.counts["calls"] += 1
        return y + self.layers[0] * self.counts["calls"]


class WithCache(nn.Sequential):
    def forward(self, x: Any) -> Any:
        cache = Cache()
        for block in self:
            x = block(x, cache)
        return x


class Deep(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(WithCache(*[Block() for _ in range(4)]), nn.Linear(6, 1))


def _blocks(module: nn.Module) -> list[Any]:
    return [each for each in module.modules() if isinstance(each, Block)]


@pytest.mark.parametrize("arguments", [{}, {"every": 2}, {"blocks": r"net\.0\.[13]"}, {"blocks": "net"}])
@pytest.mark.parametrize("options", [{}, {"fp16": True}, {"accumulate_grad_batches": 2}])
def test_it_is_exact(arguments: Any, options: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Bugs: statistics and counters count twice; the second pass has other masks, or reads buffers, hidden state or a
    cache that the first has changed; the measurement leaves a trace, such as keys in the cache; the module keeps the
    replaced forward pass."""
    ends = []
    for plugins in ([], [CheckpointActivations(**arguments)]):
        torch.manual_seed(5)
        module = Deep()
        with caplog.at_level(logging.INFO, "stabletrain"):
            trainer = fit(module, ITEMS, SkipNonFinite(), *plugins, **options)
        state = {f"hidden.{i}": torch.stack([each.hidden[0], *each.mean]) for i, each in enumerate(_blocks(module))}
        assert {each.calls for each in _blocks(module)} == {len(ITEMS)}
        ends.append({**everything(trainer), **state, "next": torch.rand(1)})
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
    with pytest.raises(UserError, match=says):  # also by `stabletrain validate`, before a run is opened
        CheckpointActivations(**arguments).prepare_trainer(quiet_trainer(), Deep())


def test_a_copy_made_in_the_fit_uses_its_own_weights() -> None:
    """Bug: a target network, copied while forward passes are replaced, computes with the original's weights."""
    found = []

    class Target(Deep):
        def on_train_start(self) -> None:
            target = copy.deepcopy(self.net)
            for p in target.parameters():
                p.data.zero_()
            found.append(target(torch.ones(3, 6)).abs().max().item())

    fit(Target(), ITEMS[:1], CheckpointActivations())
    assert found == [0.0]
