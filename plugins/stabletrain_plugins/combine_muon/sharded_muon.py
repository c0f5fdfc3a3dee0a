"""torch's Muon, exact also for matrices that are sharded over ranks (DTensor, FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate

from stabletrain.runtime.internals.muon import adjusted_rate, orthogonalized

Muon: Any = getattr(torch.optim, "Muon", torch.optim.Optimizer)  # since torch 2.9


class ShardedMuon(Muon):  # type: ignore[misc]
    """Muon whose update of a sharded matrix equals that of the whole one.

    torch.optim.Muon multiplies the shards with each other, and adds the ranks' partial products in bfloat16, which
    rounds differently than one product does. Here the update is gathered (in bfloat16, one all-gather per matrix) and
    orthogonalized on every rank. Matrices that are not sharded are torch's.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update all matrices that have a gradient.

        Args:
            closure: not used; `MuonAdamW` calls it.
        """
        sharded = [
            (group, p)
            for group in self.param_groups
            for p in group["params"]
            if isinstance(p, DTensor) and p.grad is not None
        ]
        gradients = [p.grad for _, p in sharded]
        for group, p in sharded:
            self._update(group, p)
            p.grad = None
        try:
            super().step()
        finally:
            for (_, p), gradient in zip(sharded, gradients, strict=True):
                p.grad = gradient

    def _update(self, group: dict[str, Any], p: DTensor) -> None:
        state, momentum = self.state[p], group["momentum"]
        gradient: Any = p.grad
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum) if group["nesterov"] else average
        whole = orthogonalized(update.bfloat16().full_tensor(), group)
        everywhere = DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
        rate = float(group["lr"])
        p.mul_(1 - rate * group["weight_decay"])
        p.add_(everywhere.redistribute(placements=p.placements), alpha=-adjusted_rate(rate, group, p.shape))
