"""Parameters without a dimension, which FSDP2 cannot shard: they stay whole, and their gradients are averaged."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class WholeParameters:
    """Averages the gradients of parameters that stay whole, as DistributedDataParallel does.

    Args:
        parameters: 0-d, the same on all ranks.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)

    def average_gradients(self) -> None:
        """Average the gradients over all ranks in one all-reduce, once per accumulation window. A collective.

        A gradient that some ranks lack counts as 0 there; one that all lack stays None.
        """
        trained = [p for p in self._parameters if p.requires_grad]
        if not trained:
            return
        device = trained[0].device
        wide = torch.promote_types(torch.float32, max((p.dtype for p in trained), key=lambda each: each.itemsize))
        none = torch.zeros((), device=device, dtype=wide)
        gradients = [none if p.grad is None else p.grad.detach().to(device, wide) for p in trained]
        present = [none if p.grad is None else torch.ones_like(none) for p in trained]
        packed = torch.stack([*(g / dist.get_world_size() for g in gradients), *present])
        dist.all_reduce(packed)
        means, counts = packed.chunk(2)
        for p, mean, count in zip(trained, means.unbind(), counts.unbind(), strict=True):
            if p.grad is not None:
                p.grad.copy_(mean)
            elif count:  # the device is read only where a gradient is missing
                p.grad = mean.to(p.device, p.dtype)
