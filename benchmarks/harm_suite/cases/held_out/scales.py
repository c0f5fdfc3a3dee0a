"""Unusual scales: a loss of rounding size, batches of log-normal size, a rare group with other units."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from harm_suite.data import loader, mlp, seeded, table
from harm_suite.training import Task, Training, adamw, cases


def loss_of_rounding_size(seed: int) -> Training:
    """A field in units of 1e-6, so that the loss goes from 1e-12 to 1e-15. Measure: error in the units of the field."""
    g = seeded(seed)
    x, xt = torch.rand(8000, 2, generator=g) * 2 - 1, torch.rand(3000, 2, generator=g) * 2 - 1

    def field(u: Tensor) -> Tensor:
        return torch.sin(4 * u[:, 0]) * torch.cos(3 * u[:, 1])

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        y = field(batch[0]) + 0.03 * torch.randn(len(batch[0]))
        return F.mse_loss(1e-6 * task.net(batch[0])[:, 0], 1e-6 * y)

    def optimizer(task: Task) -> torch.optim.Optimizer:
        return torch.optim.AdamW(task.parameters(), lr=3e-3, eps=1e-20)

    def metric(task: Task) -> float:
        return float((task.net(xt)[:, 0] - field(xt)).pow(2).mean().sqrt())

    return Training(Task(mlp(2, 64, 1, 2), loss, optimizer), loader(x, batch=64), 1200, metric, least=0.005)


def long_tailed_batches(seed: int) -> Training:
    """Diabetes: the number of samples in a batch is log-normal, 1 to 64. Measure: held-out squared error."""
    x, y, xt, yt = table("diabetes", 340)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        size = max(1, min(64, round(6 * math.exp(1.2 * torch.randn(()).item()))))
        u, v = (each[:size] for each in batch)
        return F.mse_loss(task.net(u + 0.3 * torch.randn_like(u))[:, 0], v)

    def metric(task: Task) -> float:
        return float(F.mse_loss(task.net(xt)[:, 0], yt))

    return Training(Task(mlp(10, 32, 1), loss, adamw(1e-3)), loader(x, y, batch=64), 900, metric, least=0.04)


def rare_instrument(seed: int) -> Training:
    """Diabetes: 3 % of the batches are from an instrument whose readings are ten times as large, as a column says.

    Measure: held-out squared error on that instrument, in units of the others.
    """
    x, y, xt, yt = table("diabetes", 340)
    g = seeded(seed)
    steps = 2000
    index = torch.randint(0, len(x), (steps, 16), generator=g)
    is_other = (torch.rand(steps, generator=g) < 0.03).float()

    def predicted(task: Task, u: Tensor, other: float) -> Tensor:
        return task.net(torch.cat([u, torch.full((len(u), 1), other)], 1))[:, 0]

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        i, other = batch[0][0], float(batch[1][0])
        return F.mse_loss(predicted(task, x[i], other), y[i] * (1 + 9 * other))

    def metric(task: Task) -> float:
        return float(F.mse_loss(predicted(task, xt, 1.0) / 10, yt))

    data = loader(index, is_other, batch=1, shuffle=False)
    return Training(Task(mlp(11, 32, 1), loss), data, steps, metric, least=0.05)


CASES = cases(loss_of_rounding_size, long_tailed_batches, rare_instrument, held_out=True)
