"""Classes that are not there from the beginning."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, seeded
from harm_suite.training import Task, Training, cases


def all_classes_after_some(seed: int) -> Training:
    """Digits 0 to 4 for 500 steps, then all. Measure: held-out error rate on 5 to 9."""
    x, y, xt, yt = digits()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        u, v = batch
        if task.global_step < 500:
            u, v = u[v < 5], v[v < 5]
        return F.cross_entropy(task.net(u + 0.1 * torch.randn_like(u)), v)

    def metric(task: Task) -> float:
        late = yt >= 5
        return float((task.net(xt[late]).argmax(1) != yt[late]).float().mean())

    return Training(Task(mlp(64, 64, 10), loss), loader(x, y, batch=64), 900, metric, least=0.02)


def new_classes_in_a_tenth_of_the_batches(seed: int) -> Training:
    """Digits 0 to 4 for 400 steps; then each tenth batch, by chance, is of 5 to 9. Measure: error on 5 to 9."""
    x, y, xt, yt = digits()
    g = seeded(seed)
    steps, size = 1400, 16
    old, new = (y < 5).nonzero()[:, 0], (y >= 5).nonzero()[:, 0]
    is_new = (torch.arange(steps) >= 400) & (torch.rand(steps, generator=g) < 0.1)
    index = torch.where(
        is_new[:, None],
        new[torch.randint(0, len(new), (steps, size), generator=g)],
        old[torch.randint(0, len(old), (steps, size), generator=g)],
    )

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        i = batch[0][0]
        return F.cross_entropy(task.net(x[i]), y[i])

    def metric(task: Task) -> float:
        late = yt >= 5
        return float((task.net(xt[late]).argmax(1) != yt[late]).float().mean())

    data = loader(index, batch=1, shuffle=False)
    return Training(Task(mlp(64, 64, 10), loss), data, steps, metric, least=0.02)


CASES = cases(all_classes_after_some, new_classes_in_a_tenth_of_the_batches)
