"""Most steps say little: rare positives, rare rewards, rare samples with a huge weight."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harm_suite.data import loader, mlp, seeded, table
from harm_suite.training import Task, Training, adamw, cases


def ranking(seed: int) -> Training:
    """Ranking of 20 items; 4 % of the queries have a positive, and the others a loss of 0. Measure: 1 - 1/rank."""
    g = seeded(seed)
    w = torch.randn(6, 6, generator=g)

    def make(n: int) -> tuple[Tensor, Tensor]:
        query, items = torch.randn(n, 1, 6, generator=g), torch.randn(n, 20, 6, generator=g)
        best = torch.einsum("nqi,ij,nkj->nk", query, w, items).argmax(1)
        return torch.cat([query.expand(-1, 20, -1), items], 2), best

    x, y = make(6000)
    xt, yt = make(1000)
    has_positive = torch.rand(len(y), generator=g) < 0.04

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        scores = task.net(batch[0])[..., 0]
        each = F.cross_entropy(scores, batch[1], reduction="none")
        return (each * batch[2]).sum() / 8

    def metric(task: Task) -> float:
        scores = task.net(xt)[..., 0]
        rank = 1 + (scores > scores.gather(1, yt[:, None])).sum(1)
        return float(1 - (1 / rank).mean())

    data = loader(x, y, has_positive.float(), batch=8)
    return Training(Task(mlp(12, 64, 1, 2), loss), data, 2000, metric, least=0.03)


def rare_reward(seed: int) -> Training:
    """REINFORCE, reward for one of 40 actions: at first most gradients are 0. Measure: 1 - reward."""
    g = seeded(seed)
    x, good = torch.randn(6000, 6, generator=g), torch.randint(0, 40, (4,), generator=g)
    projection = torch.randn(6, 4, generator=g)

    def wanted(u: Tensor) -> Tensor:
        return good[(u @ projection).argmax(1)]

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        log_p = task.net(batch[0]).log_softmax(1)
        action = torch.multinomial(log_p.exp().detach(), 1)[:, 0]
        reward = (action == wanted(batch[0])).float()
        return -(reward * log_p.gather(1, action[:, None])[:, 0]).mean()

    def metric(task: Task) -> float:
        return float(1 - task.net(x).softmax(1).gather(1, wanted(x)[:, None]).mean())

    return Training(Task(mlp(6, 64, 40), loss), loader(x, batch=8), 1800, metric, least=0.05)


def huge_weights(seed: int) -> Training:
    """Breast cancer: ten malignant samples among 250, each weighed 25-fold. Measure: balanced held-out error rate."""
    x, y, xt, yt = table("breast_cancer", 400)
    few = (y == 0).nonzero()[:, 0][torch.randperm(int((y == 0).sum()), generator=seeded(seed))[:10]]
    kept = torch.cat([few, (y == 1).nonzero()[:, 0][:240]])
    x, y = x[kept], y[kept]
    weight = torch.tensor([25.0, 1.0])

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        u = batch[0] + 0.3 * torch.randn_like(batch[0])
        each = F.cross_entropy(task.net(u), batch[1], reduction="none")
        return (each * weight[batch[1]]).mean()

    def metric(task: Task) -> float:
        is_wrong = (task.net(xt).argmax(1) != yt).float()
        return float((is_wrong[yt == 0].mean() + is_wrong[yt == 1].mean()) / 2)

    return Training(Task(mlp(30, 32, 2), loss, adamw(1e-3)), loader(x, y, batch=8), 1000, metric, least=0.01)


def counts(seed: int) -> Training:
    """Poisson regression on counts of 0 to 1,000, most of them 0. Measure: mean error of the rate's logarithm."""
    g = seeded(seed)
    w = torch.randn(5, generator=g)
    w = 1.7 * w / w.norm()

    def rate(u: Tensor) -> Tensor:
        return u @ w - 1

    x, xt = torch.randn(16000, 5, generator=g), torch.randn(4000, 5, generator=g)
    y = torch.poisson(rate(x).exp() * torch.empty(len(x)).exponential_(1.0, generator=g), generator=g)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.poisson_nll_loss(task.net(batch[0])[:, 0], batch[1])

    def metric(task: Task) -> float:
        return float((task.net(xt)[:, 0] - rate(xt)).abs().mean())

    return Training(Task(mlp(5, 32, 1), loss, adamw(1e-3)), loader(x, y, batch=16), 2000, metric, least=0.03)


CASES = cases(ranking, rare_reward, huge_weights, counts, held_out=True)
