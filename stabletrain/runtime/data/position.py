"""The position of a run in a train loader, which is saved in checkpoints and checked by the process that resumes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stabletrain.runtime import rng
from stabletrain.runtime.data.global_order import checked_order, order_of
from stabletrain.runtime.data.tape import Generators, Identity, IteratorStart, identity
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.rng import RngState


class LoaderState(NamedTuple):
    """A position in a loader.

    Args:
        batches: of the current epoch before the position; excluded batches are counted.
        start: how the epoch's iterator was created; its ``rng`` is None if it was not created yet.
        rng_before: the global generators before the fetch of the next batch, if that was prefetched.
        length: batches in an epoch, if known.
        samples: size of the dataset, if known.
        last: identity of the last batch, if its samples are known.
        generators: states of the loader's own generators; None in checkpoints of older versions.
    """

    batches: int
    start: IteratorStart
    rng_before: RngState | None = None
    length: int | None = None
    samples: int | None = None
    last: Identity | None = None
    generators: list[Tensor] | None = None

    def to_plain(self) -> dict[str, Any]:
        """As tensors and plain Python types."""
        first = None if self.start.first is None else self.start.first._asdict()
        order = None if self.start.order is None else self.start.order._asdict()
        return {**self._asdict(), "start": {**self.start._asdict(), "first": first, "order": order}}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> LoaderState:
        """The inverse of `to_plain`.

        Raises:
            KeyError, TypeError: if a field is missing or unknown, as in a checkpoint of another version.
            ValueError: if a field holds a value of another kind.
        """
        last = plain["last"]
        start = IteratorStart(**plain["start"])
        if start.first is not None:
            start = start._replace(first=Generators(**plain["start"]["first"]))
        start = start._replace(order=checked_order(start.order))
        found = cls(**{**plain, "start": start, "last": None if last is None else tuple(last)})
        for state in (start.rng, found.rng_before, None if start.first is None else start.first.rng):
            if state is not None:
                rng.check(state)
        counts = (found.batches, start.epoch, start.sampler_epoch, start.sampler_seed, found.length, found.samples)
        if found.batches is None or start.epoch is None or not all(_is_count(each) for each in counts):
            raise ValueError(f"expected counts >= 0 for batches, epochs, sizes and the sampler's seed, got {counts}")
        own = [*start.generators, *([] if start.first is None else start.first.own), *(found.generators or [])]
        if not all(isinstance(each, torch.Tensor) for each in own):
            raise ValueError("expected tensors as the states of the loader's generators")
        return found


def position_in(
    loader: Any,
    batches: int,
    start: IteratorStart,
    rng_before: RngState | None = None,
    last: Identity | None = None,
    own: list[Tensor] | None = None,
) -> LoaderState:
    """A position in this loader, with the loader's present sizes."""
    return LoaderState(
        batches, start, rng_before, size_of(loader), size_of(getattr(loader, "dataset", None)), last, own
    )


def capture_start(loader: Any, epoch: int, state: RngState | None, shared: bool) -> IteratorStart:
    """How an iterator of the loader would be created now; ``shared``: whether all ranks read the same batches."""
    sampler = _seeded_sampler(loader)
    return IteratorStart(
        epoch,
        state,
        [generator.get_state() for generator in own_generators(loader)],
        getattr(sampler, "epoch", None),
        getattr(sampler, "seed", None),
        loader_internals.reuses_workers(loader),
        order=order_of(loader, own_generators(loader), shared),
    )


def epoch_indices(start: IteratorStart) -> list[int]:
    """The samples of the epoch on all ranks, in their order.

    Args:
        start: of the epoch, whose order is known.
    """
    assert start.order is not None
    if start.first is not None:
        return start.order.indices((start.first.rng, start.first.own), has_begun=True)
    states = None if start.rng is None else (start.rng, start.generators)
    return start.order.indices(states, has_begun=False)


def restore_start(start: IteratorStart, loader: Any) -> None:
    """Set all generators and the loader's sampler as they were when the iterator was created, or will be."""
    if start.rng is not None:
        rng.restore(start.rng)
    restore_own(start.generators, loader)
    sampler = _seeded_sampler(loader)
    if sampler is not None and start.sampler_seed is not None:
        sampler.seed = start.sampler_seed
        if start.rng is not None:
            sampler.set_epoch(start.sampler_epoch)


def capture_generators(loader: Any) -> Generators:
    """The state of all generators that the loader draws from."""
    return Generators(rng.capture(), [generator.get_state() for generator in own_generators(loader)])


def restore_own(states: Sequence[Tensor], loader: Any) -> None:
    """Set the loader's own generators, in the order of `capture_generators`."""
    for generator, state in zip(own_generators(loader), states, strict=False):
        generator.set_state(state.cpu())


def of_another_world(position: LoaderState) -> LoaderState:
    """A position whose epoch was dealt out to another number of ranks, as far as it can be used by these."""
    order = position.start.order
    start = position.start._replace(order=None if order is None else order._replace(is_foreign=True))
    return position._replace(length=None, last=None, start=start)


def in_this_world(position: LoaderState, loader: Any, shared: bool) -> LoaderState:
    """The position itself, or `of_another_world` if its epoch was dealt out to another number of ranks.

    As many processes may read other data: two of tensor parallelism read as one, two of FSDP2 as two.

    Args:
        position: from the checkpoint.
        loader: as the fit loop reads from it.
        shared: whether all ranks read the same batches.
    """
    order, now = position.start.order, order_of(loader, own_generators(loader), shared)
    if order is None or now is None or (order.readers or order.replicas) == now.replicas:
        return position
    return of_another_world(position)


def size_mismatch(position: LoaderState, loader: Any) -> str:
    """Describe how the sizes of loader and dataset differ from those of the position; empty if they do not."""
    now = position_in(loader, 0, position.start)
    found = []
    if position.samples is not None and now.samples != position.samples:
        found.append(f"the dataset has {now.samples} samples, expected {position.samples}")
    if position.length is not None and now.length != position.length:
        found.append(f"the train loader has {now.length} batches an epoch, expected {position.length}")
    return " and ".join(found)


def order_mismatch(position: LoaderState, samples: Any) -> str:
    """Describe how the batch before the position differs from the checkpoint's; empty if equal or unknown.

    Args:
        position: from the checkpoint.
        samples: the indices of the batch that the loader now returns there; None if unknown.
    """
    if position.last is None or samples is None:
        return ""
    found = identity(position.start.epoch, position.batches - 1, samples)
    if found == position.last:
        return ""
    return (
        f"the order of the train loader has changed: batch {position.batches - 1} of epoch {position.start.epoch} held "
        f"the samples {_shown(position.last)} when the checkpoint was saved, and now holds {_shown(found)}"
    )


def length_mismatch(position: LoaderState, batches: int) -> str:
    """Describe that the loader ends after this number of batches, before the position."""
    return (
        f"the checkpoint was saved after batch {position.batches} of an epoch, and the train loader now ends after "
        f"{batches}"
    )


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _shown(name: Identity) -> str:
    samples = name[1:]
    return ", ".join(map(str, samples[:6])) + (", ..." if len(samples) > 6 else "")


def size_of(sized: Any) -> int | None:
    """The length of a loader or dataset; None if it has none."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _parts(loader: Any) -> Iterator[Any]:
    yield loader
    for name in ("sampler", "batch_sampler"):
        sampler = getattr(loader, name, None)
        if sampler is not None:
            yield sampler
            yield getattr(sampler, "sampler", None)


def own_generators(loader: Any) -> list[torch.Generator]:
    """The generators of the loader and its samplers, each once."""
    found = {}
    for part in _parts(loader):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def _seeded_sampler(loader: Any) -> Any:
    for part in _parts(loader):
        if isinstance(getattr(part, "seed", None), int) and callable(getattr(part, "set_epoch", None)):
            return part
    return None
