"""A small GAN, trained by hand with two optimizers; faults are part of the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

Which = Literal["generator", "discriminator"]
Batch = tuple[Tensor, Tensor, str]


def batches(faults: Sequence[str]) -> list[Batch]:
    """One batch for each fault: ``""``, or the name of the submodule whose loss is NaN in it."""
    made = []
    for i, fault in enumerate(faults):
        generator = torch.Generator().manual_seed(i)
        made.append((torch.randn(8, 2, generator=generator), torch.randn(8, 4, generator=generator), fault))
    return made


class Gan(LightningModule):
    """Two networks with batch normalisation, the discriminator's on both kinds of samples.

    Args:
        order: in which the optimizers step.
        toggle: toggle the optimizers, and remove gradients after the step, as in Lightning's example; else before it,
            so that the generator's backward pass leaves gradients in the discriminator.
        closure: pass closures to ``step``.
        together: compute both losses before the first backward pass.
        to_none: remove gradients, instead of setting them to zero.
        omit: batch and submodule of a step that is left out, as if it had been dropped.
    """

    def __init__(
        self,
        order: Sequence[Which] = ("discriminator", "generator"),
        toggle: bool = False,
        closure: bool = False,
        together: bool = False,
        omit: tuple[int, str] | None = None,
        to_none: bool = True,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.order, self.toggle, self.closure, self.together, self.omit = order, toggle, closure, together, omit
        self.to_none = to_none
        self.losses: dict[str, list[float]] = {"generator": [], "discriminator": []}

    def loss(self, which: Which, batch: Batch) -> Tensor:
        real, noise, fault = batch
        noise = noise + torch.randn(4)  # as a module draws it: the generators of random numbers take part
        if fault == which:
            real, noise = (each * math.nan for each in (real, noise))
        if which == "generator":
            return nn.functional.softplus(-self.discriminator(self.generator(noise))).mean()
        fake = self.generator(batch[1]).detach()  # a healthy one: only this network is ruined by the fault
        return (
            nn.functional.softplus(-self.discriminator(real)) + nn.functional.softplus(self.discriminator(fake))
        ).mean()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = dict(zip(("generator", "discriminator"), self.optimizers(), strict=True))  # type: ignore[arg-type]
        losses = {which: self.loss(which, batch) for which in self.order} if self.together else {}
        for which in self.order:
            if self.omit == (batch_idx, which):
                torch.randn(4)
                continue
            optimizer = optimizers[which]
            if self.toggle:
                self.toggle_optimizer(optimizer)

            def backward(which: Which = which, optimizer: Any = optimizer) -> None:
                loss = losses[which] if self.together else self.loss(which, batch)
                if not self.toggle:
                    optimizer.zero_grad(set_to_none=self.to_none)
                self.manual_backward(loss)
                self.losses[which].append(loss.item())

            if self.closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            if self.toggle:
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.Adam(each.parameters(), 1e-2) for each in (self.generator, self.discriminator)]


def end(mine: Trainer) -> dict[str, Any]:
    """Weights, buffers, and the states of both optimizers."""
    module, optimizers = mine.lightning_module.state_dict(), [each.state_dict() for each in mine.optimizers]
    return copy.deepcopy({"module": dict(module), "optimizers": optimizers})
