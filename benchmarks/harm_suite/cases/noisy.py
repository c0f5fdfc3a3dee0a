"""Large noise or a heavy tail: in labels, targets, timesteps, tiny batches, sampled rewards, and the first steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, seeded
from harm_suite.training import Task, Training, adamw, cases


def tiny_last_batch(seed: int) -> Training:
    """Digits: the last batch of each epoch holds one sample. Measure: held-out loss."""
    x, y, xt, yt = digits()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(task.net(batch[0] + 0.3 * torch.randn_like(batch[0])), batch[1])

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    data = loader(x[:1281], y[:1281], batch=64, drop_last=False)
    return Training(Task(mlp(64, 64, 10), loss), data, 1000, metric, least=0.02)


def label_noise(seed: int) -> Training:
    """Digits: 20 % of the labels are wrong. Measure: held-out error rate."""
    x, y, xt, yt = digits()
    g = seeded(seed)
    is_wrong = torch.rand(len(y), generator=g) < 0.2
    y = torch.where(is_wrong, torch.randint(0, 10, y.shape, generator=g), y)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(task.net(batch[0]), batch[1])

    def metric(task: Task) -> float:
        return float((task.net(xt).argmax(1) != yt).float().mean())

    return Training(Task(mlp(64, 64, 10), loss), loader(x, y, batch=16), 800, metric, least=0.02)


def pareto_targets(seed: int) -> Training:
    """Regression on targets with a Pareto tail of 2.2 that the inputs explain. Measure: mean absolute error."""
    g = seeded(seed)

    def make(n: int) -> tuple[Tensor, Tensor]:
        u = torch.rand(n, generator=g).clamp(1e-4)
        x = torch.randn(n, 6, generator=g)
        x[:, 0] = -u.log()
        return x, u ** (-1 / 2.2) + 0.1 * torch.randn(n, generator=g)

    x, y = make(12000)
    xt, yt = make(6000)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(task.net(batch[0])[:, 0], batch[1])

    def metric(task: Task) -> float:
        return float((task.net(xt)[:, 0] - yt).abs().mean())

    return Training(Task(mlp(6, 64, 1), loss), loader(x, y, batch=16), 1500, metric, least=0.05)


def diffusion(seed: int) -> Training:
    """Noise prediction in the plane, batches of 4; the loss has three decades over the timesteps. Measure: the loss."""
    g = seeded(seed)

    def make(n: int) -> Tensor:
        a = torch.rand(n, generator=g) * 2 * math.pi
        return torch.stack([a.cos(), a.sin()], 1) + 0.05 * torch.randn(n, 2, generator=g)

    x, xt = make(8000), make(4000)

    def noised(u: Tensor, t: Tensor, e: Tensor) -> Tensor:
        keep = torch.cos(t * math.pi / 2)[:, None]
        return torch.cat([keep * u + (1 - keep**2).sqrt() * e, t[:, None], keep], 1)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        u = batch[0]
        t, e = torch.rand(len(u)), torch.randn_like(u)
        return F.mse_loss(task.net(noised(u, t, e)), e)

    def metric(task: Task) -> float:
        h = seeded(0)
        t, e = torch.rand(len(xt), generator=h), torch.randn(xt.shape, generator=h)
        return float(F.mse_loss(task.net(noised(xt, t, e)), e))

    return Training(Task(mlp(4, 64, 2, 2), loss), loader(x, batch=4), 1500, metric, least=0.02)


def policy_gradient(seed: int) -> Training:
    """Group-normalised policy gradient with a KL term: at first the loss is rounding noise. Measure: 1 - reward."""
    vocabulary, group = 32, 8
    g = seeded(seed)
    x, good = torch.randn(4000, 8, generator=g), torch.randint(0, vocabulary, (8,), generator=g)
    projection = torch.randn(8, 8, generator=g)
    net = mlp(8, 64, vocabulary)
    reference = mlp(8, 64, vocabulary).requires_grad_(False)
    reference.load_state_dict(net.state_dict())

    def wanted(u: Tensor) -> Tensor:
        return good[(u @ projection).argmax(1)][:, None]

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        own, kept = task.net(batch[0]).log_softmax(1), reference(batch[0]).log_softmax(1)
        action = torch.multinomial(own.exp().detach(), group, replacement=True)
        reward = (action == wanted(batch[0])).float()
        advantage = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        chosen = own.gather(1, action)
        difference = kept.gather(1, action) - chosen
        return (
            -((chosen - chosen.detach()).exp() * advantage).mean() + 0.04 * (difference.exp() - difference - 1).mean()
        )

    def metric(task: Task) -> float:
        return float(1 - task.net(x).softmax(1).gather(1, wanted(x)).mean())

    return Training(Task(net, loss, adamw(2e-3)), loader(x), 1200, metric, least=0.05)


def early_large_gradients(seed: int) -> Training:
    """Targets far from zero: the first gradients are 100 times as long as the later ones; SGD. Measure: error."""
    g = seeded(seed)
    x, xt = torch.randn(6000, 8, generator=g), torch.randn(2000, 8, generator=g)
    w = torch.randn(8, generator=g)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(task.net(batch[0])[:, 0], 20 + torch.sin(batch[0] @ w))

    def metric(task: Task) -> float:
        return float(F.mse_loss(task.net(xt)[:, 0], 20 + torch.sin(xt @ w)))

    def optimizer(task: Task) -> torch.optim.Optimizer:
        return torch.optim.SGD(task.parameters(), lr=3e-3, momentum=0.9)

    return Training(Task(mlp(8, 64, 1), loss, optimizer), loader(x), 900, metric, least=0.03)


CASES = cases(tiny_last_batch, label_noise, pareto_targets, diffusion, policy_gradient, early_large_gradients)
