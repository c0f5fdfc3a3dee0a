"""Several tasks or loss terms in one training."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, seeded
from harm_suite.training import Task, Training, cases


def tasks_in_blocks(seed: int) -> Training:
    """Two tasks of different scale, 150 batches of the one, then 150 of the other. Measure: mean relative error."""
    g = seeded(seed)
    x, w = torch.randn(43200, 12, generator=g), torch.randn(12, 2, generator=g) * 0.3
    xt = torch.randn(2000, 12, generator=g)
    scale = torch.tensor([1.0, 2.5])
    kind = (torch.arange(43200) // (32 * 150)) % 2

    def target(u: Tensor) -> Tensor:
        return torch.tanh(u @ w) * scale

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        which = int(batch[1][0])
        y = target(batch[0])[:, which] + 0.3 * scale[which] * torch.randn(len(batch[0]))
        return F.mse_loss(task.net(batch[0])[:, which], y)

    def metric(task: Task) -> float:
        return float((((task.net(xt) - target(xt)) / scale) ** 2).mean())

    return Training(Task(mlp(12, 64, 2), loss), loader(x, kind, shuffle=False), 1350, metric, least=0.01)


def new_loss_term(seed: int) -> Training:
    """An auxiliary loss is switched on at step 500. Measure: its error rate, plus the first task's error."""
    g = seeded(seed)

    def make(n: int) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(n, 16, generator=g)
        return x, 0.5 * x[:, :8], (x[:, 8:].sum(1) > 0).long()

    x, y, z = make(8000)
    xt, yt, zt = make(2000)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.a, self.b = mlp(16, 64, 32), nn.Linear(32, 8), nn.Linear(32, 2)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        h = task.net.trunk(batch[0])
        total = F.mse_loss(task.net.a(h), batch[1] + 0.3 * torch.randn_like(batch[1]))
        return total + F.cross_entropy(task.net.b(h), batch[2]) if task.global_step >= 500 else total

    def metric(task: Task) -> float:
        h = task.net.trunk(xt)
        return float((task.net.b(h).argmax(1) != zt).float().mean() + F.mse_loss(task.net.a(h), yt))

    return Training(Task(Net(), loss), loader(x, y, z, batch=64), 1100, metric, least=0.02)


def kl_ramp(seed: int) -> Training:
    """A VAE on digits; the KL weight climbs from step 400 to 500. Measure: held-out loss with the full weight."""
    x, _, xt, _ = digits()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.d = mlp(64, 64, 16), mlp(8, 64, 64)

    def parts(net: Net, u: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mu, lv = net.e(u).chunk(2, 1)
        z = mu + noise[: len(u)] * (lv / 2).exp()
        return (net.d(z) - u).pow(2).sum(1).mean(), 0.5 * (mu**2 + lv.exp() - 1 - lv).sum(1).mean()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        rec, kl = parts(task.net, batch[0], torch.randn(64, 8))
        return rec + 0.3 * min(1.0, max(0.0, (task.global_step - 400) / 100)) * kl

    def metric(task: Task) -> float:
        rec, kl = parts(task.net, xt, torch.randn(len(xt), 8, generator=seeded(0)))
        return float(rec + 0.3 * kl)

    return Training(Task(Net(), loss), loader(x, batch=64), 1000, metric, least=0.05)


def third_task_every_40th_step(seed: int) -> Training:
    """Two tasks alternate; each 40th batch is of a third one, three times as large. Measure: mean relative error."""
    g = seeded(seed)
    x, xt = torch.randn(64 * 640, 12, generator=g), torch.randn(2000, 12, generator=g)
    w = torch.randn(12, 3, generator=g) * 0.3
    scale = torch.tensor([1.0, 1.0, 3.0])
    batch_number = torch.arange(len(x)) // 32
    kind = torch.where(batch_number % 40 == 39, 2, batch_number % 2)

    def target(u: Tensor) -> Tensor:
        return torch.tanh(u @ w) * scale

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        which = int(batch[1][0])
        y = target(batch[0])[:, which] + 0.1 * scale[which] * torch.randn(len(batch[0]))
        return F.mse_loss(task.net(batch[0])[:, which], y)

    def metric(task: Task) -> float:
        return float((((task.net(xt) - target(xt)) / scale) ** 2).mean())

    return Training(Task(mlp(12, 64, 3), loss), loader(x, kind, shuffle=False), 1600, metric, least=0.01)


CASES = cases(tasks_in_blocks, new_loss_term, kl_ramp, third_task_every_40th_step)
