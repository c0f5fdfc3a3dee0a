"""Run on three ranks: fits under DDP that are resumed, and compared with the whole fit."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from fits import SaveAfter, assert_same, everything, run, trainer
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from stabletrain import DDPZeRO1Strategy, ResumeExactly

SMALL = {"bucket_cap_mb": 0.003}
"""About 3 kB: one layer of `Net` in each bucket."""


class Net(LightningModule):
    """Gradients become ready in an order which is neither that of registration nor its reverse.

    Args:
        double: whether one layer has float64 parameters, which need buckets of their own.
    """

    def __init__(self, double: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Linear(24, 24) for _ in range(4))
        if double:
            self.a.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.d(torch.tanh(self.b(x))))
        return self.c(torch.tanh(self.a(x.to(self.a.weight.dtype))).float())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[0].flip(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Frozen(Net):
    """One layer is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.d.requires_grad_(False)


def train(
    options: dict[str, Any],
    resume: str | None = None,
    *,
    saves: dict[int, str] | None = None,
    accumulate: int = 1,
    make: Any = Net,
    strategy: type[DDPStrategy] = DDPStrategy,
    exactly: bool = True,
) -> tuple[dict[str, Tensor], list[str]]:
    """Train for 8 batches; weights and optimizer state, and the warnings of ResumeExactly.

    Args:
        options: of the strategy.
        resume: a checkpoint to resume from.
        saves: number of a batch, from 0, and the checkpoint to save after it.
        accumulate: batches in a step.
        make: makes the module.
        strategy: its class.
        exactly: with ResumeExactly.
    """
    torch.manual_seed(3)
    data = torch.randn(8 * 3 * 4, 24, generator=torch.Generator().manual_seed(1))
    mine = trainer(
        *([ResumeExactly()] if exactly else []),
        *[SaveAfter(batch, Path(path)) for batch, path in (saves or {}).items()],
        strategy=strategy(process_group_backend="gloo", **options),
        devices=3,
        accumulate_grad_batches=accumulate,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(mine, make(), DataLoader(TensorDataset(data), 4, shuffle=True), ckpt_path=resume)
    return everything(mine), [str(each.message) for each in caught if "resume_exactly" in str(each.message)]


def without_buckets(path: str) -> str:
    """A copy for this rank of a checkpoint, as earlier versions have saved it."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["resume_exactly"]["buckets"]
    copy = f"{path}-{os.environ['RANK']}"
    torch.save(checkpoint, copy)
    return copy


def resumed(folder: Path) -> list[str]:
    """Resumes after the first step, and from that run in mid-run; returns the warnings of a fit with a frozen layer."""
    os.chdir(folder)
    bare, _ = train(SMALL, exactly=False)
    whole, _ = train(SMALL, saves={0: "first"})
    assert_same(whole, bare)
    for state, warned in (train(SMALL, "first", saves={4: "middle"}), train(SMALL, "middle")):
        assert_same(state, whole)
        assert not warned
    old, warned = train(SMALL, without_buckets("middle"))
    # if this fails, gloo adds in one order wherever a gradient is, and nothing has to be saved
    assert any(not torch.equal(old[name], whole[name]) for name in whole)
    assert not warned
    return train(SMALL, "middle", make=Frozen)[1]


def kinds(folder: Path) -> None:
    """Resumes with all kinds of buckets; within an accumulation window, too."""
    os.chdir(folder)
    for name, saves, options, more in (
        ("view", {2: "in window", 5: "after"}, {"gradient_as_bucket_view": True}, {"accumulate": 2}),
        ("double", {3: "after"}, {}, {"make": lambda: Net(double=True)}),
        ("static", {1: "second", 3: "after"}, {"static_graph": True}, {}),
        ("unused", {0: "first", 3: "after"}, {"find_unused_parameters": True}, {}),
        ("zero1", {3: "after"}, {}, {"strategy": DDPZeRO1Strategy}),
    ):
        places = {batch: f"{name} {place}" for batch, place in saves.items()}
        bare, _ = train({**SMALL, **options}, exactly=False, **more)
        whole, _ = train({**SMALL, **options}, saves=places, **more)
        assert_same(whole, bare)
        for path in places.values():
            state, warned = train({**SMALL, **options}, path, **more)
            assert_same(state, whole)
            assert not warned
