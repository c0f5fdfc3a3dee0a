"""Regularisation that is not computed at every step, or not from the beginning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, seeded, table
from harm_suite.training import Task, Training, adamw, cases


def penalty_every_16th_step(seed: int) -> Training:
    """The targets are of one half of the space; at each 16th step a penalty, weighed 16-fold, asks for a symmetry.

    The function is odd in the first input. Measure: error in the half without targets.
    """
    g = seeded(seed)
    x, xt = torch.randn(12000, 4, generator=g), torch.randn(3000, 4, generator=g)
    mirror = torch.tensor([-1.0, 1.0, 1.0, 1.0])

    def target(u: Tensor) -> Tensor:
        return 2 * torch.tanh(u[:, 0]) * (1 + 0.5 * torch.sin(2 * u[:, 1]))

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        u = batch[0].clone()
        u[:, 0] = u[:, 0].abs()
        total = F.mse_loss(task.net(u)[:, 0], target(u) + 0.1 * torch.randn(len(u)))
        if task.global_step % 16 == 0:
            total = total + 16 * (task.net(u) + task.net(u * mirror)).pow(2).mean()
        return total

    def metric(task: Task) -> float:
        u = xt.clone()
        u[:, 0] = -u[:, 0].abs()
        return float(F.mse_loss(task.net(u)[:, 0], target(u)))

    return Training(Task(mlp(4, 64, 1), loss), loader(x, batch=64), 1200, metric, least=0.03)


def adversarial_training(seed: int) -> Training:
    """Digits: from step 400 on, each image is shifted by 0.15 against the net (FGSM). Measure: loss on such images."""
    x, y, xt, yt = digits()

    def attacked(task: Task, u: Tensor, v: Tensor) -> Tensor:
        u = u.clone().requires_grad_(True)
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(F.cross_entropy(task.net(u), v), u)
        return (u + 0.15 * slope.sign()).detach()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        u = attacked(task, *batch) if task.global_step >= 400 else batch[0]
        return F.cross_entropy(task.net(u), batch[1])

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(attacked(task, xt, yt)), yt))

    return Training(Task(mlp(64, 64, 10), loss), loader(x, y, batch=64), 1000, metric, least=0.05)


def dropout_begins(seed: int) -> Training:
    """Breast cancer: dropout of a half of the units from step 300 on. Measure: held-out loss."""
    x, y, xt, yt = table("breast_cancer", 400)
    dropout = nn.Dropout(0.0)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        dropout.p = 0.5 if task.global_step >= 300 else 0.0
        return F.cross_entropy(task.net(batch[0]), batch[1])

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    net = nn.Sequential(dropout, *mlp(30, 64, 64), nn.ReLU(), nn.Dropout(0.0), nn.Linear(64, 2))
    return Training(Task(net, loss, adamw(1e-3)), loader(x, y, batch=32), 800, metric, least=0.01)


CASES = cases(penalty_every_16th_step, adversarial_training, dropout_begins)
