"""The loss itself has an unusual scale: it is multiplied, negative, or driven by a learning rate that steps up."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, seeded
from harm_suite.training import Task, Training, cases


def loss_times_8(seed: int) -> Training:
    """Digits with noise: the loss is multiplied by 8 from step 500 on, which AdamW does not mind. Measure: loss."""
    x, y, xt, yt = digits()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        plain = F.cross_entropy(task.net(batch[0] + 0.3 * torch.randn_like(batch[0])), batch[1])
        return 8 * plain if task.global_step >= 500 else plain

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    return Training(Task(mlp(64, 64, 10), loss), loader(x, y, batch=64), 900, metric, least=0.02)


def negative_log_likelihood(seed: int) -> Training:
    """A density with a spread of 0.01 to 0.3: the loss passes zero and ends near -1.5. Measure: the same, held out."""
    g = seeded(seed)

    def make(n: int) -> tuple[Tensor, Tensor]:
        x = torch.rand(n, 2, generator=g) * 2 - 1
        spread = 0.01 * 30 ** ((x[:, 1] + 1) / 2)
        return x, torch.sin(3 * x[:, 0]) + spread * torch.randn(n, generator=g)

    x, y = make(12000)
    xt, yt = make(6000)

    def likelihood(net: nn.Module, u: Tensor, v: Tensor) -> Tensor:
        mean, log_spread = net(u).unbind(1)
        return (log_spread + 0.5 * ((v - mean) / log_spread.exp()) ** 2).mean()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return likelihood(task.net, *batch)

    def metric(task: Task) -> float:
        return float(likelihood(task.net, xt, yt))

    return Training(Task(mlp(2, 64, 2, 2), loss), loader(x, y, batch=32), 1200, metric, least=0.1)


def rate_steps_up(seed: int) -> Training:
    """Digits, SGD with momentum: the module multiplies its rate by 8 at step 400. Measure: held-out loss."""
    x, y, xt, yt = digits()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(task.net(batch[0] + 0.2 * torch.randn_like(batch[0])), batch[1])

    def optimizer(task: nn.Module) -> dict:
        o = torch.optim.SGD(task.parameters(), lr=0.02, momentum=0.9)
        s = torch.optim.lr_scheduler.LambdaLR(o, lambda step: 8.0 if step >= 400 else 1.0)
        return {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step"}}

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    return Training(Task(mlp(64, 64, 10), loss, optimizer), loader(x, y, batch=64), 900, metric, least=0.01)


CASES = cases(loss_times_8, negative_log_likelihood, rate_steps_up)
