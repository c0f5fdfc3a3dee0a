"""Where a run stands in a train loader, as something that a checkpoint can hold and another process can check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.data.tape import Identity, IteratorStart, identity
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.rng import RngState

_WAY_OUT = (
    "Put the data back as they were; or go on with other data from a checkpoint made at the end of an epoch; or leave "
    "ResumeExactly out (config key plugins.resume=none), and the data begin anew."
)


class LoaderState(NamedTuple):
    """A place in a loader.

    Args:
        items: batches of the current epoch that were trained on.
        start: how the epoch's iterator began; its ``rng`` is None if that is still to come.
        rng_before: the generators before the fetch of the next batch, if it was fetched ahead.
        length: batches in an epoch, if known.
        samples: size of the dataset, if known.
        last: identity of the last batch, where it is known by its samples.
    """

    items: int
    start: IteratorStart
    rng_before: RngState | None = None
    length: int | None = None
    samples: int | None = None
    last: Identity | None = None

    def to_plain(self) -> dict[str, Any]:
        """As tensors and plain Python types."""
        return {**self._asdict(), "start": self.start._asdict()}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> LoaderState:
        """The inverse of `to_plain`."""
        last = plain["last"]
        start = IteratorStart(**plain["start"])
        return cls(**{**plain, "start": start, "last": None if last is None else tuple(last)})

    def compare_last(self, samples: Any) -> None:
        """Check the batch before this position.

        Raises:
            UserError: if the loader gives other samples there than when the checkpoint was made.
        """
        if self.last is None or samples is None:
            return
        found = identity(self.start.epoch, self.items - 1, samples)
        if found != self.last:
            raise UserError(
                f"resume_exactly: the order of the train loader has changed: batch {self.items - 1} of epoch "
                f"{self.start.epoch} held the samples {_shown(self.last)} when the checkpoint was made, and now holds "
                f"{_shown(found)}. {_WAY_OUT}"
            )


def position_in(
    loader: Any, items: int, start: IteratorStart, rng_before: RngState | None = None, last: Identity | None = None
) -> LoaderState:
    """A position in this loader."""
    return LoaderState(items, start, rng_before, _size(loader), _size(getattr(loader, "dataset", None)), last)


def start_of(loader: Any, epoch: int, state: RngState | None) -> IteratorStart:
    """How an iterator of the loader would begin now."""
    sampler = _seeded_sampler(loader)
    return IteratorStart(
        epoch,
        state,
        [generator.get_state() for generator in _own_generators(loader)],
        getattr(sampler, "epoch", None),
        getattr(sampler, "seed", None),
        loader_internals.has_kept_workers(loader),
    )


def restore_start(start: IteratorStart, loader: Any) -> None:
    """Bring all generators and the loader's sampler to where an iterator began, or is to begin."""
    if start.rng is not None:
        rng.restore(start.rng)
    for generator, state in zip(_own_generators(loader), start.generators, strict=False):
        generator.set_state(state.cpu())
    sampler = _seeded_sampler(loader)
    if sampler is not None and start.sampler_seed is not None:
        sampler.seed = start.sampler_seed
        if start.rng is not None:
            sampler.set_epoch(start.sampler_epoch)


def check(position: LoaderState, loader: Any) -> None:
    """Compare sizes.

    Raises:
        UserError: if loader or dataset have another size than when the checkpoint was made within an epoch.
    """
    now = position_in(loader, 0, position.start)
    found = []
    if position.samples is not None and now.samples != position.samples:
        found.append(f"the dataset has {now.samples} samples, and had {position.samples}")
    if position.length is not None and now.length != position.length:
        found.append(f"the train loader has {now.length} batches an epoch, and had {position.length}")
    if not found:
        return
    message = f"resume_exactly: {' and '.join(found)} when the checkpoint was made"
    if position.items:
        raise UserError(f"{message}, after batch {position.items} of an epoch. {_WAY_OUT}")
    from lightning_utilities.core.rank_zero import rank_zero_warn

    rank_zero_warn(f"{message}, at the end of an epoch: training goes on with the data as they are now")


def too_short(position: LoaderState, found: int) -> UserError:
    """The error of a loader that ends before the position."""
    return UserError(
        f"resume_exactly: the checkpoint was made after batch {position.items} of an epoch, and the train loader now "
        f"ends after {found}. {_WAY_OUT}"
    )


def _shown(name: Identity) -> str:
    samples = name[1:]
    return ", ".join(map(str, samples[:6])) + (", ..." if len(samples) > 6 else "")


def _size(sized: Any) -> int | None:
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


def _own_generators(loader: Any) -> list[torch.Generator]:
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
