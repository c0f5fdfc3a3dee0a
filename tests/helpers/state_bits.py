"""A small network and optimizers of it whose state has 32 and 8 bits, for tests of the conversion."""

from __future__ import annotations

import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Make = Callable[[Any], Optimizer]
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def of(name: str, **options: Any) -> Make:
    """An optimizer by its module and class.

    Args:
        name: as ``torch.optim.AdamW``.
        options: its arguments.
    """

    def make(groups: Any) -> Optimizer:
        module, _, kind = name.rpartition(".")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages, when they are imported
            made: Optimizer = getattr(importlib.import_module(module), kind)(groups, **options)
        return made

    return make


class Small(nn.Module):
    """An embedding and three layers, of 64 kB and less; biases are too small for 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Embedding(64, 64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.GELU(), nn.Linear(64, 64)
        )

    def groups(self) -> list[dict[str, Any]]:
        others = list(self.net[1:].parameters())
        return [{"params": [self.net[0].weight], "kind": "embedding"}, {"params": others, "kind": "weight"}]

    def steps(self, optimizer: Optimizer, first: int, count: int) -> Tensor:
        """Train; the change of all parameters."""
        before = torch.cat([p.detach().flatten() for p in self.parameters()])
        for i in range(first, first + count):
            x = torch.randint(0, 64, (32,), generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(x), (x * 7 + 3) % 64).backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in self.parameters()]) - before


def through_a_file(optimizer: Optimizer) -> dict[str, Any]:
    """The state of an optimizer, saved and read as data: torchao's cannot be copied otherwise."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def distance(update: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative L2 error and cosine."""
    error = float((update - expected).norm() / expected.norm())
    return error, float(torch.dot(update, expected) / update.norm() / expected.norm())
