"""The order in which all ranks together see the samples of an epoch: so that another number of ranks can end it.

Torch and Lightning deal the samples of an epoch out to the ranks in turns: with W ranks, rank r gets the samples r,
r + W, r + 2W, ... of one order. With batches of B samples, the first W * B * k samples of that order are used after k
batches, whatever W is, as long as W * B is the same. So the rest of the epoch can be dealt out to any number of ranks,
if the order is known: that of torch's own samplers is a function of their arguments and of random generators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from stabletrain.runtime import rng
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.rng import RngState

UNKNOWN_ORDER = "the order is known of torch's own samplers on a map-style dataset only, and not in older checkpoints"
"""Why the rest of an epoch cannot be dealt out."""


class GlobalOrder(NamedTuple):
    """The order of one epoch of a map-style DataLoader.

    Args:
        kind: ``sequential``; ``random`` (torch's RandomSampler); ``seeded`` (a DistributedSampler that shuffles).
        samples: of the dataset.
        replicas: on how many ranks the samples were dealt out.
        batch: samples in a batch of one rank.
        seed: of a seeded order: seed + epoch of the sampler.
        generator: of a random order: index of the sampler's generator in the loader's own; -1: the global generator.
        base_generator: the same of the generator from which the loader draws a seed for its processes, before the
            sampler draws.
        is_foreign: whether the loader's own order in this run is another: the epoch was begun by another number of
            ranks.
        readers: on how many ranks the rest of a foreign order is dealt out; 0: it is not foreign.
    """

    kind: str
    samples: int
    replicas: int
    batch: int
    seed: int = 0
    generator: int = -1
    base_generator: int = -1
    is_foreign: bool = False
    readers: int = 0

    def indices(self, states: tuple[RngState, Sequence[Tensor]] | None, *, has_begun: bool) -> list[int]:
        """The samples in their order, each once.

        Args:
            states: of the global generators and of the loader's own, before the epoch; needed by a random order.
            has_begun: whether these states are those before the first fetch, and not before the iterator was made.
        """
        if self.kind == "sequential":
            return list(range(self.samples))
        if self.kind == "seeded":
            generator = torch.Generator()
            generator.manual_seed(self.seed)
            found: list[int] = torch.randperm(self.samples, generator=generator).tolist()
            return found
        assert states is not None
        own = [torch.Generator() for _ in states[1]]
        for each, state in zip(own, states[1], strict=True):
            each.set_state(state.cpu())
        with rng.preserved():
            rng.restore(states[0])
            if not has_begun:
                torch.empty((), dtype=torch.int64).random_(generator=_pick(own, self.base_generator))
            return list(RandomSampler(range(self.samples), generator=_pick(own, self.generator)))


def _pick(own: Sequence[torch.Generator], index: int) -> torch.Generator | None:
    return None if index == -1 else own[index]


def order_of(loader: Any, generators: Sequence[torch.Generator], shared: bool) -> GlobalOrder | None:
    """Return the order of the loader's next epoch; None if it is not known.

    Args:
        loader: as the fit loop reads from it.
        generators: the loader's own.
        shared: whether all ranks read the same batches, as under tensor parallelism.
    """
    if not loader_internals.takes_index_sampler(loader) or type(loader.batch_sampler) is not BatchSampler:
        return None
    sampler, dealt = loader.sampler, dealt_out(loader, shared)
    if dealt is None or loader.batch_size is None:
        return None
    samples = len(loader.dataset)
    if type(sampler) is DistributedSampler:
        kind = "seeded" if sampler.shuffle else "sequential"
        return GlobalOrder(kind, samples, dealt[0], loader.batch_size, sampler.seed + sampler.epoch)
    if type(sampler) is SequentialSampler:
        return GlobalOrder("sequential", samples, 1, loader.batch_size)
    if type(sampler) is not RandomSampler or sampler.replacement or sampler.num_samples != samples:
        return None
    if loader_internals.reuses_workers(loader):  # these have no new seed drawn for them
        return None
    own, base = (-1 if each is None else generators.index(each) for each in (sampler.generator, loader.generator))
    return GlobalOrder("random", samples, 1, loader.batch_size, generator=own, base_generator=base)


def dealt_out(loader: DataLoader[Any], shared: bool) -> tuple[int, int] | None:
    """On how many ranks the loader's samples are dealt out, and this rank's number; None if that is not known.

    Args:
        loader: with a sampler.
        shared: whether all ranks read the same batches.
    """
    if isinstance(loader.sampler, DistributedSampler):
        return loader.sampler.num_replicas, loader.sampler.rank
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    return (1, 0) if alone or shared else None


def checked_order(plain: Any) -> GlobalOrder | None:
    """The order in a checkpoint of any content.

    Raises:
        TypeError, ValueError: if it is something else.
    """
    if plain is None:
        return None
    found = GlobalOrder(**plain)
    numbers = (found.samples, found.replicas, found.batch, found.seed, found.generator, found.base_generator)
    known = found.kind in ("sequential", "random", "seeded") and type(found.is_foreign) is bool
    if (
        not known
        or not all(type(each) is int for each in (*numbers, found.readers))
        or min(numbers[:4]) < 0
        or min(numbers[:3]) < 1
    ):
        raise ValueError(f"expected the order of a train loader, got {plain!r:.200}")
    return found


def why_not_continued(order: GlobalOrder | None, loader: Any, shared: bool) -> str:
    """Why the rest of an epoch that other ranks have begun cannot be dealt out with this loader; empty if it can.

    Args:
        order: of the epoch, from the checkpoint.
        loader: of this process, as the fit loop reads from it.
        shared: whether all ranks read the same batches.
    """
    if order is None:
        return UNKNOWN_ORDER
    sized = loader_internals.takes_index_sampler(loader) and type(loader.batch_sampler) is BatchSampler
    dealt = dealt_out(loader, shared) if sized and loader.batch_size is not None else None
    if dealt is None:
        return "the present train loader does not deal the samples out with torch's DistributedSampler"
    if len(loader.dataset) != order.samples:
        return f"the dataset has {len(loader.dataset)} samples, and had {order.samples}"
    now, before = dealt[0] * loader.batch_size, order.replicas * order.batch
    if now != before:
        return (
            f"all ranks together trained on {before} samples in a batch ({order.replicas} x {order.batch}), and now on "
            f"{now} ({dealt[0]} x {loader.batch_size}); choose the batch size so that they are as many"
        )
    return ""


def dealt_batches(indices: Sequence[int], loader: DataLoader[Any], shared: bool) -> list[list[int]]:
    """The batches of this rank, of an epoch in this order; as torch's DistributedSampler and BatchSampler make them.

    Args:
        indices: of all samples.
        loader: of this process.
        shared: whether all ranks read the same batches.
    """
    dealt = dealt_out(loader, shared)
    assert dealt is not None
    replicas, rank = dealt
    total = len(indices)
    if getattr(loader.sampler, "drop_last", False):
        indices = indices[: total - total % replicas]
    elif total % replicas:
        missing = replicas - total % replicas
        indices = [*indices, *(indices[i % total] for i in range(missing))]
    return list(BatchSampler(indices[rank::replicas], loader.batch_size or 1, loader.drop_last))
