"""The processes that train together: collectives for common decisions, and which parameters are equal on all."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from stabletrain.runtime.internals.ddp import ddp_parameters
from stabletrain.runtime.internals.packages import both

T = TypeVar("T")

Placement: TypeAlias = Literal["sharded", "replicated", "local"]
"""Distribution of a parameter over the ranks: in parts, as equal copies, or as copies that nothing keeps equal."""

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

    @property
    def number(self) -> int:
        """This process, from 0."""
        return int(getattr(self._strategy, "global_rank", 0))  # strategies of one process have none

    @property
    def device(self) -> torch.device:
        """The device of this process, whose tensors a collective takes."""
        return self._strategy.root_device

    def sum(self, *numbers: float) -> list[float]:
        """Numbers, each added over all ranks. A collective."""
        if self.size == 1:
            return list(numbers)
        packed = torch.tensor(numbers, device=self._strategy.root_device)
        dist.all_reduce(packed)
        return [float(each) for each in packed]

    def any(self, flag: bool) -> bool:
        """Whether a flag is set on any rank. A collective."""
        return self.max(int(flag)) > 0  # Lightning's reduce_boolean_decision adds a barrier

    def sum_tensor(self, numbers: Tensor) -> Tensor:
        """A tensor, added over all ranks, without a read by the host. A collective."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def max_tensor(self, numbers: Tensor) -> Tensor:
        """Of each number of a tensor the largest on any rank, without a read by the host. A collective."""
        if self.size > 1:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return numbers

    def max(self, number: int) -> int:
        """The largest number on any rank. A collective."""
        if self.size == 1:
            return number
        largest = torch.tensor(number, device=self._strategy.root_device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def max_each(self, numbers: list[float]) -> Tensor:
        """Of each number the largest on any rank, in float64. A collective."""
        largest = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest

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

    def broadcast(self, value: T | None, source: int) -> T | None:
        """The value of one rank, of any type that can be pickled, on all of them. A collective.

        Args:
            value: of rank ``source``; of the others it is ignored.
            source: a rank.
        """
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, source)
        received: T | None = values[0]
        return received

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        """The numbers of all ranks, by rank, of each equally many. A collective."""
        mine = torch.tensor(numbers, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return [each.tolist() for each in everyone]

    def placement(self, parameter: Tensor) -> Placement:
        """The distribution of a parameter over the ranks.

        A DTensor has it as an attribute. A plain tensor is ``"sharded"`` under FSDP's first version. Otherwise it is
        ``"replicated"`` if something keeps its copies equal, and ``"local"`` if nothing does. They are kept equal

        - in a single process;
        - by DistributedDataParallel, if it was not told to ignore the parameter; the trained ones, if they were
          trainable when this was first asked, since it averages no others;
        - by a strategy whose attribute ``averages_plain_gradients`` is true;
        - under a ModelParallelStrategy without data parallelism, where all ranks see the same data;
        - if the parameter is frozen and DistributedDataParallel is not used: nothing changes it.
        """
        if isinstance(parameter, DTensor):
            return "replicated" if all(each.is_replicate() for each in parameter.placements) else "sharded"
        if isinstance(self._strategy, both(FSDPStrategy)):
            return "sharded"
        if self.size == 1 or self.sees_same_data or getattr(self._strategy, "averages_plain_gradients", False):
            return "replicated"
        if not parameter.requires_grad:
            return "replicated" if parameter in self._ddp_trains or not self._ddp_trains else "local"
        return "replicated" if self._ddp_trains.get(parameter) else "local"

    @functools.cached_property
    def sees_same_data(self) -> bool:
        """Whether all ranks train on the same data: a ModelParallelStrategy without data parallelism."""
        strategy = self._strategy
        return isinstance(strategy, both(ModelParallelStrategy)) and strategy.device_mesh["data_parallel"].size() == 1

    @property
    def recomputes_copies(self) -> bool:
        """Whether several ranks compute the gradients of a copied parameter each for itself (tensor parallel)."""
        strategy = self._strategy
        return isinstance(strategy, both(ModelParallelStrategy)) and strategy.device_mesh["tensor_parallel"].size() > 1

    @functools.cached_property
    def _ddp_trains(self) -> dict[Tensor, bool]:
        """The parameters that DistributedDataParallel sends to all ranks; whether it averages the gradient."""
        return {p: p.requires_grad for p in ddp_parameters(getattr(self._strategy, "model", None))}


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
