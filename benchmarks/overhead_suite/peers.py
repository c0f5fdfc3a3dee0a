"""What people have in a training loop without stabletrain, to compare with."""

from __future__ import annotations

import importlib.util
import math
import statistics
from typing import Any

import lightning as L
import torch
from baton import Case, Pace
from torch.utils.data import DataLoader

from overhead_suite.training import Batches, TinyMLP


class ItemNaNCheck(L.Callback):
    """A common check for NaN in scripts."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for p in pl_module.parameters():
            if p.grad is not None and not torch.isfinite(p.grad).all().item():
                raise RuntimeError("NaN")


class ZClipRestated(L.Callback):
    """ZClip, written anew from its paper (https://arxiv.org/abs/2504.02507): z-score on an EMA, reciprocal clipping."""

    def __init__(self) -> None:
        self.mean = self.var = 0.0
        self.warmup: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.sqrt(sum((g.pow(2).sum() for g in grads), torch.zeros(()))).item()
        if len(self.warmup) < 25:
            self.warmup.append(norm)
            self.mean = statistics.fmean(self.warmup)
            self.var = statistics.pvariance(self.warmup)
            return
        std = math.sqrt(self.var)
        clipped = self.mean + 2.5**2 * self.var / (norm - self.mean) if norm > self.mean + 2.5 * std else norm
        if clipped < norm:
            for g in grads:
                g.mul_(clipped / norm)
        self.mean = 0.97 * self.mean + 0.03 * clipped
        self.var = 0.97 * self.var + 0.03 * (clipped - self.mean) ** 2


def plain_loop(steps: int) -> Case:
    """A loop without Lightning."""

    def train(pace: Pace) -> None:
        torch.manual_seed(0)
        module = TinyMLP(pace)
        optimizer = module.configure_optimizers()
        for i, batch in enumerate(DataLoader(Batches(steps), batch_size=None)):
            loss = module.training_step(batch, i)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return train


def accelerate_loop(steps: int) -> Case | None:
    """The same loop as accelerate's documentation writes it; None if accelerate is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        return None

    def train(pace: Pace) -> None:
        from accelerate import Accelerator

        torch.manual_seed(0)
        accelerator = Accelerator(cpu=True)
        module = TinyMLP(pace)
        data = DataLoader(Batches(steps), batch_size=None)
        model, optimizer, loader = accelerator.prepare(module, module.configure_optimizers(), data)
        for i, batch in enumerate(loader):
            loss = model.training_step(batch, i)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

    return train


def stability_guard() -> bool:
    """Whether stabilityguard is installed (``pip install -e '.[peers]'``)."""
    return importlib.util.find_spec("stabilityguard") is not None
