"""Terms that work against each other: two players in one optimizer, similar and dissimilar pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from harm_suite.data import digits, loader, mlp, seeded
from harm_suite.training import Task, Training, adamw, cases


def two_players(seed: int) -> Training:
    """A GAN in one optimizer: the discriminator's loss at odd steps, the generator's at even ones, on a line.

    Measure: mean distance of the sorted generated samples from those of the data (Wasserstein). It is 2 at first and
    has a standard deviation of 0.11 over 8 seeds, so that ``least`` is large.
    """
    g = seeded(seed)

    def make(n: int) -> Tensor:
        return 1 + torch.empty(n, 1).exponential_(1.0, generator=g)

    x, xt = make(12000), make(4000)
    latent = torch.randn(4000, 4, generator=seeded(0))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.discriminator = mlp(4, 32, 1, 2), mlp(1, 32, 1, 2)

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        net: Net = task.net
        fake = net.generator(torch.randn(len(batch[0]), 4))
        if task.global_step % 2:
            real, made = net.discriminator(batch[0]), net.discriminator(fake.detach())
            return F.softplus(-real).mean() + F.softplus(made).mean()
        frozen = {name: p.detach() for name, p in net.discriminator.named_parameters()}
        return F.softplus(-functional_call(net.discriminator, frozen, (fake,))).mean()

    def optimizer(task: Task) -> dict:
        o = torch.optim.AdamW(task.parameters(), lr=2e-3, betas=(0.5, 0.9))
        s = torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / 2000)
        return {"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "step"}}

    def metric(task: Task) -> float:
        made = task.net.generator(latent)
        return float((made[:, 0].sort().values - xt[:, 0].sort().values).abs().mean())

    return Training(Task(Net(), loss, optimizer), loader(x, batch=64), 2000, metric, least=0.2)


def contrastive(seed: int) -> Training:
    """Digits, two noisy views each: the inverse temperature climbs from 1 to 30. Measure: share of views not found."""
    x, _, xt, _ = digits()
    noise = torch.randn(2, *xt.shape, generator=seeded(0))

    def loss(task: Task, batch: list[Tensor]) -> Tensor:
        a, b = (F.normalize(task.net(batch[0] + 0.2 * torch.randn_like(batch[0])), dim=1) for _ in range(2))
        return F.cross_entropy((1 + 29 * min(1.0, task.global_step / 700)) * a @ b.T, torch.arange(len(a)))

    def metric(task: Task) -> float:
        a, b = (F.normalize(task.net(xt + 0.2 * each), dim=1) for each in noise)
        return float(((a @ b.T).argmax(1) != torch.arange(len(a))).float().mean())

    return Training(Task(mlp(64, 128, 16), loss, adamw(2e-3)), loader(x, batch=64), 1000, metric, least=0.03)


CASES = cases(two_players, contrastive, held_out=True)
