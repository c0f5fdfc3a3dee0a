"""The processes that train together: what they agree on, and who keeps their parameters equal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Placement: TypeAlias = Literal["sharded", "replicated", "local"]
"""How a parameter lies on the ranks: in parts, as equal copies, or as copies that nothing keeps equal."""


class Ranks:
    """The processes of a fit, of which every one makes the same decision at every step.

    Args:
        trainer: in a fit; its strategy has set up the model.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._strategy = trainer.strategy
        self.size: int = trainer.world_size
        """Number of processes."""
        self.is_first: bool = trainer.is_global_zero
        """Whether this is the process that speaks for all."""

    def mean_loss(self, losses: list[Tensor]) -> Tensor | None:
        """The mean loss over the micro-batches of the window and over all ranks, as a 0-d tensor. A collective.

        Sum and count travel in one all-reduce over all ranks, so that all get the same bits: where several ranks see
        the same data (tensor parallelism), their copies change neither. A NaN or infinity on any rank makes the result
        non-finite on all.

        Args:
            losses: 0-d tensors, one for each micro-batch of this rank; may be empty.

        Returns:
            None if no rank had a loss.
        """
        if self.size == 1:
            if not losses:
                return None
            return losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        device = losses[0].device if losses else self._strategy.root_device
        total = torch.stack(losses).sum(dtype=torch.float32) if losses else torch.zeros((), device=device)
        packed = torch.stack([total, torch.full((), float(len(losses)), device=device)])
        dist.all_reduce(packed)
        if not losses and not packed[1]:  # a rank that had a loss knows the answer, and does not wait for the device
            return None
        return packed[0] / packed[1]

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank. A collective."""
        return bool(self._strategy.reduce_boolean_decision(flag, all=False)) if self.size > 1 else flag

    def placement(self, parameter: Tensor) -> Placement:
        """How a parameter lies on the ranks.

        A DTensor says so itself. A plain tensor is a replica where DistributedDataParallel averages its gradients, and
        a local copy under strategies that shard some modules and average nothing else.
        """
        if isinstance(parameter, DTensor):
            return "replicated" if all(each.is_replicate() for each in parameter.placements) else "sharded"
        return "replicated" if self.size == 1 or self._averages_all else "local"

    def local_parameters(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        """The names of those trained parameters that nothing keeps equal on the ranks."""
        return [name for name, p in named if p.requires_grad and self.placement(p) == "local"]

    @property
    def _averages_all(self) -> bool:
        return isinstance(self._strategy.model, DistributedDataParallel)
