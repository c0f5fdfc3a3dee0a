"""The messages of a step from the sizes of the parameters alone, for a step that cannot be traced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stabletrain.planning.plan import Collective, Group
from stabletrain.runtime.internals.fake_world import bucket_sizes
from stabletrain.runtime.internals.shards import held_bytes


def messages(
    strategy: Any, wrapped: Any, module: nn.Module, groups: Sequence[Group], micro_batches: int
) -> list[Collective] | None:
    """The collectives of an optimizer step; None: they are not known without a step.

    Args:
        strategy: that has set up the module.
        wrapped: the module as the strategy calls it.
        module: the LightningModule.
        groups: of parameters, from `stabletrain.planning.state.groups`.
        micro_batches: in a step.
    """
    if isinstance(wrapped, DistributedDataParallel):
        buckets = bucket_sizes(wrapped)
        found = [Collective(kind="all-reduce", count=len(buckets), bytes=sum(buckets))]
        if hasattr(strategy, "divides_optimizer"):
            tensors = [p for p in module.parameters() if p.requires_grad]
            found.append(Collective(kind="broadcast", count=len(tensors), bytes=held_bytes(tensors)))
        return found
    if hasattr(strategy, "replicate"):
        return list(_sharded(strategy, module, groups, micro_batches))
    return None if isinstance(strategy, ModelParallelStrategy) else []


def _sharded(strategy: Any, module: nn.Module, groups: Sequence[Group], micro_batches: int) -> Iterable[Collective]:
    """FSDP2: a unit is gathered for forward and for backward; gradients are reduced when due.

    The rest is gathered twice if the step calls the module itself, ``self(batch)``, which is assumed; else once.
    """
    passes = 2 if strategy.options.reshard_after_forward else 1
    times = [(each.count * (passes if each.name else 2) * micro_batches, each) for each in groups]
    yield Collective(
        kind="all-gather", count=sum(n for n, _ in times), bytes=sum(n * each.whole_bytes for n, each in times)
    )
    reductions = 1 if strategy.defer else micro_batches
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad and p.ndim)
    number = sum(each.count for each in groups)
    yield Collective(kind="reduce-scatter", count=number * reductions, bytes=trained * reductions)
    if strategy.replicate > 1:
        part = held_bytes(p for p in module.parameters() if p.requires_grad and p.ndim)
        yield Collective(kind="all-reduce", count=number * reductions, bytes=part * reductions)
