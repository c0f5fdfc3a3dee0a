"""The module itself changes something at a planned step: length, difficulty, trained layers, learning rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, seeded
from harm_suite.training import Task, Training, cases


def curriculum(seed: int) -> Training:
    """Harder targets from step 500 on. Measure: error on the hard task."""
    x = torch.rand(16000, 4, generator=seeded(seed)) * 2 - 1
    xt = torch.rand(4000, 4, generator=seeded(seed + 1000)) * 2 - 1

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        u = batch[0]
        y = torch.sin(2 * u.sum(1)) + 0.2 * torch.randn(len(u))
        if task.global_step >= 500:
            y = y + 0.8 * torch.sin(7 * u[:, 0])
        return F.mse_loss(task.net(u)[:, 0], y)

    def metric(task: Task) -> float:
        y = torch.sin(2 * xt.sum(1)) + 0.8 * torch.sin(7 * xt[:, 0])
        return float(F.mse_loss(task.net(xt)[:, 0], y))

    return Training(Task(mlp(4, 128, 1), loss), loader(x, batch=64), 1400, metric, least=0.02)


def sequence_length(seed: int) -> Training:
    """A GRU sums its inputs; sequences of 4, 8, 16, then 32, 200 steps each. Measure: error at 32."""
    g = seeded(seed)
    x, xt = torch.randn(6000, 32, 1, generator=g), torch.randn(1000, 32, 1, generator=g)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.out = nn.GRU(1, 24, batch_first=True), nn.Linear(24, 1)

        def forward(self, u: Tensor) -> Tensor:
            return self.out(self.gru(u)[0][:, -1])[:, 0]

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        length = 4 * 2 ** min(3, task.global_step // 200)
        u = batch[0][:, :length]
        return F.mse_loss(task.net(u), u.sum((1, 2)))

    def metric(task: Task) -> float:
        return float(F.mse_loss(task.net(xt), xt.sum((1, 2))))

    return Training(Task(Net(), loss), loader(x), 1000, metric, least=0.5)


def unfreezing(seed: int) -> Training:
    """Digits: the head alone for 400 steps, then the whole net, with a rate of its own. Measure: held-out loss."""
    x, y, xt, yt = digits()

    class Unfrozen(Task):
        attempts = 0

    def loss(task: Unfrozen, batch: list[Tensor]) -> Tensor:
        if task.attempts == 400:
            task.net[0].requires_grad_(True)
        task.attempts += 1
        return F.cross_entropy(task.net(batch[0] + 0.2 * torch.randn_like(batch[0])), batch[1])

    def optimizer(task: Unfrozen) -> torch.optim.Optimizer:
        head, first = task.net[2].parameters(), task.net[0].parameters()
        return torch.optim.AdamW([{"params": head, "lr": 3e-3}, {"params": first, "lr": 1e-2}])

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    net = mlp(64, 64, 10)
    net[0].requires_grad_(False)
    return Training(Unfrozen(net, loss, optimizer), loader(x, y, batch=64), 900, metric, least=0.02)


def warm_restarts(seed: int) -> Training:
    """Digits: the module's cosine with warm restarts every 300 steps, and a high peak. Measure: held-out loss."""
    x, y, xt, yt = digits()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(task.net(batch[0] + 0.3 * torch.randn_like(batch[0])), batch[1])

    def optimizer(task: nn.Module) -> dict:
        o = torch.optim.AdamW(task.parameters(), lr=0.05)
        s = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 300)
        return {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step"}}

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    return Training(Task(mlp(64, 64, 10), loss, optimizer), loader(x, y, batch=64), 1200, metric, least=0.03)


CASES = cases(curriculum, sequence_length, unfreezing, warm_restarts)
