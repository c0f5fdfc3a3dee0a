"""Run by one rank: what FSDP2 keeps in private attributes."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from stabletrain.runtime.internals import sharding


def private(folder: Path) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder / 'store'}")
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    fully_shard(module[0])
    fully_shard(module)
    x, grads = torch.ones(2, 3), []
    for forget in (False, True):
        module.zero_grad()
        module.set_requires_gradient_sync(False)
        module(x).sum().backward()
        assert all(p.grad is None for p in module.parameters())
        if forget:
            sharding.forget_unreduced_gradients(module)
        module.set_requires_gradient_sync(True)
        module(x).sum().backward()
        grads.append([p.grad.full_tensor() for p in module.parameters()])
    for both, one in zip(*grads, strict=True):
        assert torch.allclose(both, 2 * one)
    values = [torch.ones(3), torch.zeros(2, dtype=torch.int64)]
    sharding.broadcast_coalesced(values)
    assert values[0].tolist() == [1.0] * 3
