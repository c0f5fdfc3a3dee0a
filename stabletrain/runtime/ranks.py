"""The processes that train together: collectives for common decisions, and which parameters are equal on all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain.runtime.internals.packages import both

T = TypeVar("T")

Placement: TypeAlias = Literal["sharded", "replicated", "local"]
"""Distribution of a parameter over the ranks: in parts, as equal copies, or as copies that may differ."""


_BUCKET = 25 << 20
"""Bytes of gradients that are averaged together, as in DistributedDataParallel."""


class Ranks:
    """The processes of a fit, all of which make the same decision at every step.

    Args:
        trainer: in a fit; its strategy has set up the model.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._strategy = trainer.strategy
        self.size: int = trainer.world_size
        """Number of processes."""
        self.is_first: bool = trainer.is_global_zero
        """Whether this is rank 0, which logs and writes files."""

    def mean_loss(self, losses: list[Tensor], *flags: bool) -> tuple[Tensor | None, list[Tensor | bool]]:
        """The mean loss over the window and over all ranks, and on how many of them each flag is set. A collective.

        Sum, count and flags are added over all ranks in one all-reduce, so that all ranks get the same bits. Ranks that
        see the same data (tensor parallelism) do not change the mean. A NaN or infinity on any rank makes the mean
        non-finite on all ranks.

        Args:
            losses: 0-d tensors, one for each micro-batch of this rank; may be empty.
            flags: of this rank.

        Returns:
            The mean, a 0-d tensor, None if no rank had a loss. And the flags: of one process as they are, of several
            0-d tensors, the number of ranks on which each is set, so that no rank has to read the device.
        """
        if self.size == 1:
            if not losses:
                return None, list(flags)
            return losses[0] if len(losses) == 1 else torch.stack(losses).mean(), list(flags)
        total, count, *numbers = self._sums(losses, len(losses), *flags)
        if not losses and not count:  # only a rank without a loss has to read the device
            return None, list(numbers)
        return total / count, list(numbers)

    def weighted_mean_loss(
        self, losses: list[Tensor], weight: float, *flags: bool
    ) -> tuple[Tensor | None, float | Tensor, list[Tensor | bool]]:
        """As `mean_loss`, of losses that are multiplied by weights already. A collective.

        Args:
            losses: 0-d tensors, one for each micro-batch of this rank, each multiplied by its weight; may be empty.
            weight: the sum of this rank's weights, >= 0.
            flags: of this rank.

        Returns:
            The mean, NaN if all weights are 0. The sum of the weights of all ranks, of one process as it is. The flags.
        """
        if self.size == 1:
            return torch.stack(losses).sum() / weight if losses else None, weight, list(flags)
        total, count, weights, *numbers = self._sums(losses, len(losses), weight, *flags)
        if not losses and not count:
            return None, weights, list(numbers)
        return total / weights, weights, list(numbers)

    def _sums(self, losses: list[Tensor], *numbers: float) -> list[Tensor]:
        """The sum of the losses and each number, added over all ranks in one all-reduce."""
        device = losses[0].device if losses else self._strategy.root_device
        total = torch.stack(losses).sum(dtype=torch.float32) if losses else torch.zeros((), device=device)
        packed = torch.stack([total, *(torch.full((), float(each), device=device) for each in numbers)])
        dist.all_reduce(packed)
        return list(packed)

    def sum(self, *numbers: float) -> list[float]:
        """Numbers, each added over all ranks. A collective."""
        if self.size == 1:
            return list(numbers)
        packed = torch.tensor(numbers, device=self._strategy.root_device)
        dist.all_reduce(packed)
        return [float(each) for each in packed]

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank. A collective."""
        return bool(self._strategy.reduce_boolean_decision(flag, all=False)) if self.size > 1 else flag

    def sum_tensor(self, numbers: Tensor) -> Tensor:
        """A tensor, added over all ranks, without a read by the host. A collective."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def max(self, number: int) -> int:
        """The largest number on any rank. A collective."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self._strategy.root_device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def average_(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients over all ranks, in place, as DistributedDataParallel would have. A collective.

        A gradient that some ranks lack counts as zeros there; one that all lack stays None.
        """
        trained = [p for p in parameters if p.requires_grad]
        present = torch.tensor([float(p.grad is not None) for p in trained], device=self._strategy.root_device)
        dist.all_reduce(present)
        wanted = [p for p, number in zip(trained, present.tolist(), strict=True) if number]
        for p in wanted:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.div_(self.size)
        for part in _buckets([p.grad for p in wanted if p.grad is not None]):
            flat = torch.cat([each.reshape(-1) for each in part])
            dist.all_reduce(flat)
            for each, values in zip(part, flat.split_with_sizes([each.numel() for each in part]), strict=True):
                each.copy_(values.view_as(each))

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, of any type that can be pickled, by rank. A collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def placement(self, parameter: Tensor) -> Placement:
        """The distribution of a parameter over the ranks.

        A DTensor has it as an attribute. A plain tensor is ``"sharded"`` under FSDP's first version, ``"local"`` under
        a ModelParallelStrategy that trains on different data and averages the gradients of sharded modules only, and
        otherwise ``"replicated"``: DistributedDataParallel averages all gradients, and so is assumed of other
        strategies.
        """
        if isinstance(parameter, DTensor):
            return "replicated" if all(each.is_replicate() for each in parameter.placements) else "sharded"
        if isinstance(self._strategy, both(FSDPStrategy)):
            return "sharded"
        return "local" if self._averages_sharded_modules_only else "replicated"

    def local_parameters(self, named: Iterable[tuple[str, Tensor]]) -> list[str]:
        """The names of the trained parameters whose copies may differ between the ranks."""
        return [name for name, p in named if p.requires_grad and self.placement(p) == "local"]

    @property
    def _averages_sharded_modules_only(self) -> bool:
        strategy = self._strategy
        if getattr(strategy, "averages_plain_gradients", False):
            return False
        return isinstance(strategy, both(ModelParallelStrategy)) and strategy.device_mesh["data_parallel"].size() > 1


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of tensors of one type, each of about 25 MiB."""
    part: list[Tensor] = []
    for each in tensors:
        size = sum(t.numel() * t.element_size() for t in part)
        if part and (size >= _BUCKET or each.dtype != part[0].dtype or each.device != part[0].device):
            yield part
            part = []
        part.append(each)
    if part:
        yield part
