"""A training in phases: other targets, other batches, other layers, another arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, table
from harm_suite.training import Task, Training, adamw, cases


def mixup_begins(seed: int) -> Training:
    """Digits: mixup from step 350 on, at which the loss rises tenfold. Measure: held-out loss on even mixes."""
    x, y, xt, yt = digits()

    def mixed(task: Task, u: Tensor, v: Tensor, other: Tensor, share: Tensor) -> Tensor:
        logits = task.net(share[:, None] * u + (1 - share[:, None]) * u[other])
        own, others = (F.cross_entropy(logits, t, reduction="none") for t in (v, v[other]))
        return (share * own + (1 - share) * others).mean()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        if task.global_step < 350:
            return F.cross_entropy(task.net(batch[0]), batch[1])
        return mixed(task, *batch, torch.randperm(64), torch.rand(64))

    def metric(task: Task) -> float:
        return float(mixed(task, xt, yt, torch.arange(len(xt)).roll(1), torch.full((len(xt),), 0.5)))

    return Training(Task(mlp(64, 64, 10), loss), loader(x, y, batch=64), 900, metric, least=0.05)


def label_smoothing_ends(seed: int) -> Training:
    """Digits: label smoothing of 0.3 until step 500, none from then on. Measure: held-out loss."""
    x, y, xt, yt = digits()

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        u = batch[0] + 0.2 * torch.randn_like(batch[0])
        return F.cross_entropy(task.net(u), batch[1], label_smoothing=0.3 if task.global_step < 500 else 0.0)

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    return Training(Task(mlp(64, 64, 10), loss), loader(x, y, batch=64), 900, metric, least=0.015)


def batch_sizes(seed: int) -> Training:
    """Wine: batches of 64, of 2 from step 250, of 64 again from step 650. Measure: held-out loss."""
    x, y, xt, yt = table("wine", 120)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        size = 2 if 250 <= task.global_step < 650 else 64
        u, v = (each[:size] for each in batch)
        return F.cross_entropy(task.net(u + 0.5 * torch.randn_like(u)), v)

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    return Training(Task(mlp(13, 32, 3), loss, adamw(1e-3)), loader(x, y, batch=64), 800, metric, least=0.02)


def gradual_unfreezing(seed: int) -> Training:
    """Digits, four layers: the last alone, then one more every 150 steps. Measure: held-out loss."""
    x, y, xt, yt = digits()

    class Unfrozen(Task):
        attempts = 0

    def loss(task: Unfrozen, batch: list[Tensor]) -> Tensor:
        if task.attempts in (150, 300, 450):
            task.net[6 - 2 * (task.attempts // 150)].requires_grad_(True)
        task.attempts += 1
        return F.cross_entropy(task.net(batch[0] + 0.2 * torch.randn_like(batch[0])), batch[1])

    def metric(task: Task) -> float:
        return float(F.cross_entropy(task.net(xt), yt))

    net = mlp(64, 64, 10, depth=3)
    net[:6].requires_grad_(False)
    return Training(Unfrozen(net, loss, adamw(3e-3)), loader(x, y, batch=64), 900, metric, least=0.015)


def quantisation_begins(seed: int) -> Training:
    """Digits: from step 400 on, weights are rounded to three values (straight-through). Measure: loss when rounded."""
    x, y, xt, yt = digits()

    def rounded(net: nn.Module, u: Tensor) -> Tensor:
        weights = {}
        for name, p in net.named_parameters():
            step = 1.4 * p.abs().mean()
            near = (p / step).round().clamp(-1, 1) * step
            weights[name] = p + (near - p).detach() if p.ndim == 2 else p
        return functional_call(net, weights, (u,))

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        logits = rounded(task.net, batch[0]) if task.global_step >= 400 else task.net(batch[0])
        return F.cross_entropy(logits, batch[1])

    def metric(task: Task) -> float:
        return float(F.cross_entropy(rounded(task.net, xt), yt))

    return Training(Task(mlp(64, 64, 10), loss), loader(x, y, batch=64), 900, metric, least=0.015)


def hard_then_easy(seed: int) -> Training:
    """Digits: noisy for 500 steps, then clean, with each 25th batch noisy. Measure: error rate on noisy images."""
    x, y, xt, yt = digits()
    noise = torch.randn(xt.shape, generator=torch.Generator().manual_seed(0))

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        is_hard = task.global_step < 500 or task.global_step % 25 == 0
        return F.cross_entropy(task.net(batch[0] + 0.6 * is_hard * torch.randn_like(batch[0])), batch[1])

    def metric(task: Task) -> float:
        return float((task.net(xt + 0.6 * noise).argmax(1) != yt).float().mean())

    return Training(Task(mlp(64, 64, 10), loss, adamw(2e-3)), loader(x, y, batch=64), 1300, metric, least=0.03)


CASES = cases(
    mixup_begins,
    label_smoothing_ends,
    batch_sizes,
    gradual_unfreezing,
    quantisation_begins,
    hard_then_easy,
    held_out=True,
)
