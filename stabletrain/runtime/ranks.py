"""Agreement between ranks: one fused all-reduce per step, so that every rank decides on the same numbers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_loss(losses: list[Tensor]) -> Tensor:
    """The mean loss over the micro-batches of the window and over all ranks, as a 0-d tensor.

    Sum and count travel in one all-reduce. A NaN or infinity on any rank wins on all of them: a sum keeps it.

    Args:
        losses: 0-d tensors, one for each micro-batch of this rank; may be empty on a rank that had none.
    """
    if world_size() == 1:
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean()
    return _reduce(losses)


def _reduce(losses: list[Tensor]) -> Tensor:
    device = losses[0].device if losses else torch.device("cpu")
    total = torch.stack(losses).sum(dtype=torch.float32) if losses else torch.zeros((), device=device)
    packed = torch.stack([total, torch.full((), float(len(losses)), device=device)])
    dist.all_reduce(packed)
    return packed[0] / packed[1]
