"""Something rare is to be learned: a class, a domain, a kind of sample."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, seeded
from harm_suite.training import Task, Training, adamw, cases


def positives(share: float, seed: int, n: int, distance: float) -> tuple[Tensor, Tensor]:
    """Return ``n`` samples with 16 inputs, and their classes: a share of positives, ``distance`` away on one axis."""
    g = seeded(seed)
    y = (torch.rand(n, generator=g) < share).float()
    y[: max(4, int(0.5 * share * n))] = 1.0
    x = torch.randn(n, 16, generator=g)
    x[:, 0] += distance * y
    return x, y


def rare_class(seed: int, share: float, steps: int, distance: float, rate: float = 3e-3) -> Training:
    """Binary classification in batches of 16."""
    x, y = positives(share, seed, 8000, distance)
    xt, yt = positives(share, seed + 1000, 16000, distance)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(task.net(batch[0])[:, 0], batch[1])

    def metric(task: Task) -> float:
        logits = task.net(xt)[:, 0]
        p, n = logits[yt > 0], logits[yt == 0]
        return float((p <= 0).float().mean() + (n > 0).float().mean() + 0.2 * F.softplus(-p).mean().clamp(max=5.0))

    return Training(Task(mlp(16, 32, 1), loss, adamw(rate)), loader(x, y, batch=16), steps, metric, least=0.03)


def rare_class_5_permille(seed: int) -> Training:
    """A class with 0.5 % of the samples.

    Measure: the share of it that is missed + the share of the others taken for it + 0.2 x its mean loss (at most 5).
    """
    return rare_class(seed, 0.005, 1200, 6.0)


def rare_class_1_permille(seed: int) -> Training:
    """A class with 0.1 % of the samples. Measure: as before."""
    return rare_class(seed, 0.001, 1500, 12.0, rate=3e-2)


def rare_class_2_percent(seed: int) -> Training:
    """A class with 2 % of the samples. Measure: as before."""
    return rare_class(seed, 0.02, 800, 5.0)


def rare_domain(seed: int, share: float = 0.03) -> Training:
    """One domain per batch; 3 % of the batches are of a domain whose targets have another scale. Measure: its error."""
    g = seeded(seed)

    def make(blocks: int) -> tuple[Tensor, Tensor, Tensor]:
        rare = (torch.rand(blocks, generator=g) < share).float()
        x = torch.randn(blocks, 8, 9, generator=g)
        x[:, :, 8] = rare[:, None]
        y = 0.5 * x[:, :, :4].sum(2) + rare[:, None] * 3 * x[:, :, 4]
        return x, y + 0.1 * torch.randn(y.shape, generator=g), rare

    x, y, _ = make(1500)
    xt, yt, rare = make(1500)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.mse_loss(task.net(batch[0][0])[..., 0], batch[1][0])

    def metric(task: Task) -> float:
        return float(((task.net(xt)[..., 0] - yt) ** 2).mean(1)[rare > 0].mean())

    return Training(Task(mlp(9, 64, 1), loss), loader(x, y, batch=1), 2200, metric, least=0.05)


def fine_tuning(seed: int) -> Training:
    """Digits, from good weights at a loss near zero; 1 % of the batches are transposed. Measure: error on those."""
    x, y, xt, yt = digits()
    net = mlp(64, 64, 10)
    before = torch.optim.AdamW(net.parameters(), lr=3e-3)
    g = seeded(seed)
    for _ in range(600):
        i = torch.randint(0, len(x), (64,), generator=g)
        F.cross_entropy(net(x[i]), y[i]).backward()
        before.step()
        before.zero_grad()
    is_turned = torch.rand(4000, generator=g) < 0.01
    index = torch.randint(0, len(x), (4000, 16), generator=g)

    def turned(u: Tensor) -> Tensor:
        return u.view(-1, 8, 8).transpose(1, 2).reshape(-1, 64)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        i, turn = batch[0][0], bool(batch[1][0])
        return F.cross_entropy(task.net(turned(x[i]) if turn else x[i]), y[i])

    def metric(task: Task) -> float:
        return float((task.net(turned(xt)).argmax(1) != yt).float().mean())

    return Training(Task(net, loss, adamw(1e-3)), loader(index, is_turned, batch=1), 2500, metric, least=0.04)


CASES = cases(rare_class_5_permille, rare_class_1_permille, rare_class_2_percent, rare_domain, fine_tuning)
