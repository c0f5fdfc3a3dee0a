"""A record of the events of a train loader, from which its batches can be replayed, whatever iterable it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from stabletrain.runtime.data.batch_size import batch_bytes
from stabletrain.runtime.data.global_order import GlobalOrder
from stabletrain.runtime.rng import QuickState, RngState

Identity: TypeAlias = tuple[Any, ...]
"""Names a batch across restarts: ``("samples", 4, 17, ...)`` by sample indices, else ``("batch", epoch, position)``."""


class Generators(NamedTuple):
    """The random generators that a loader draws from.

    Args:
        rng: the global ones.
        own: the loader's and its samplers' own.
    """

    rng: RngState
    own: list[Tensor]


class IteratorStart(NamedTuple):
    """How an iterator of the loader was created: enough to create it again, in another process too.

    Args:
        epoch: of the run, from 0.
        rng: the global generators just before it was created; None if it was not created yet.
        generators: states of the loader's and its samplers' own generators.
        sampler_epoch: argument of the sampler's last ``set_epoch``, if it has that method.
        sampler_seed: the seed of a sampler whose order is a function of seed and epoch.
        reuses_workers: whether it uses the (persistent) worker processes of an earlier iterator.
        first: the generators before its first fetch, if it fetches in this process: a sampler draws its seed then, not
            when the iterator is created. None: it has not fetched yet.
        order: of the epoch's samples on all ranks, a `GlobalOrder`, if it is known.
    """

    epoch: int
    rng: RngState | None
    generators: list[Tensor]
    sampler_epoch: int | None = None
    sampler_seed: int | None = None
    reuses_workers: bool = False
    first: Generators | None = None
    order: GlobalOrder | None = None


class EpochStarted(NamedTuple):
    """An iterator of the loader was created.

    Args:
        start: how it was created.
        position: of the last batch that was skipped on resume, -1 for none.
        rng_after: the global generators after that; None if the tape is off.
    """

    start: IteratorStart
    position: int
    rng_after: QuickState | None


class TapedBatch(NamedTuple):
    """A batch was fetched.

    Args:
        batch: as the loader returned it, on the host.
        epoch: of the run, from 0.
        position: within the epoch, from 0; excluded batches are counted.
        samples: the sample indices; None if no sampler gives them.
        rng_before: the global generators before the fetch, if a checkpoint may need them.
        rng_after: the global generators after the fetch; None if it drew no random number or the tape is off.
        first: the generators before the fetch, of the iterator's first batch; see `IteratorStart`.
    """

    batch: Any
    epoch: int
    position: int
    samples: Any = None
    rng_before: QuickState | None = None
    rng_after: QuickState | None = None
    first: Generators | None = None

    @property
    def identity(self) -> Identity:
        """Names the batch by its samples, or by its position if these are unknown."""
        return identity(self.epoch, self.position, self.samples)

    @property
    def position_key(self) -> Identity:
        """Names the batch by its position, which is the same on all ranks."""
        return identity(self.epoch, self.position, None)


class EpochEnded(NamedTuple):
    """The iterator was exhausted.

    Args:
        position: the number of batches; excluded batches are counted.
        rng_after: the global generators after that; None if no random number was drawn or the tape is off.
    """

    position: int
    rng_after: QuickState | None


TapeEvent: TypeAlias = EpochStarted | TapedBatch | EpochEnded


def identity(epoch: int, position: int, samples: Any) -> Identity:
    """Name a batch by its samples if they are numbers or strings, else by its position.

    >>> identity(0, 7, [4, 17])
    ('samples', 4, 17)
    >>> identity(0, 7, None)
    ('batch', 0, 7)
    """
    if samples is not None:
        each = samples if isinstance(samples, Sequence) and not isinstance(samples, str) else [samples]
        try:
            return ("samples", *(index if isinstance(index, str) else int(index) for index in each))
        except (TypeError, ValueError):
            pass
    return ("batch", epoch, position)


def sample_names(samples: Any) -> tuple[Any, ...]:
    """The samples of a batch as numbers or strings; empty if they are unknown, or are neither.

    >>> sample_names([4, 17])
    (4, 17)
    >>> sample_names(None)
    ()
    """
    kind, *names = identity(0, 0, samples)
    return tuple(names) if kind == "samples" else ()


class Tape:
    """Numbered events, of which the newest are stored, with a read position that can be moved back to replay them.

    Args:
        enabled: store new events; otherwise they are only counted.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.next_number = 0  # of the event that is replayed next; equal to `end` if there is none
        self._first = 0
        self._events: list[TapeEvent] = []
        self._sizes: list[int | None] = []  # of the same events: bytes of a batch, None if it is no batch
        self.batches = 0
        """How many batches are stored."""
        self.nbytes = 0
        """Size of the stored batches, bytes."""

    @property
    def end(self) -> int:
        """The number of the next new event."""
        return self._first + len(self._events)

    @property
    def first(self) -> int:
        """The number of the oldest stored event."""
        return self._first

    def __getitem__(self, number: int) -> TapeEvent:
        return self._events[number - self._first]

    def replay(self) -> TapeEvent | None:
        """Return the next event and move past it; None at the end of the tape."""
        if self.next_number >= self.end:
            return None
        self.next_number += 1
        return self[self.next_number - 1]

    def record(self, event: TapeEvent) -> None:
        """Append a new event and move to the end; if not enabled, drop it and all stored events."""
        if not self.enabled:
            self._first = self.next_number = self.end + 1
            self._events.clear()
            self._sizes.clear()
            self.batches = self.nbytes = 0
            return
        size = batch_bytes(event.batch) if type(event) is TapedBatch else None
        self._events.append(event)
        self._sizes.append(size)
        if size is not None:
            self.batches += 1
            self.nbytes += size
        self.next_number = self._first + len(self._events)

    def forget_before(self, number: int) -> None:
        """Drop the events before this number, except those that are still to be replayed."""
        count = min(number, self.next_number) - self._first
        if count <= 0:
            return
        self._uncount(self._sizes[:count])
        del self._events[:count], self._sizes[:count]
        self._first += count

    def truncate(self) -> None:
        """Drop the events that are still to be replayed."""
        start = self.next_number - self._first
        self._uncount(self._sizes[start:])
        del self._events[start:], self._sizes[start:]

    def _uncount(self, sizes: Sequence[int | None]) -> None:
        for size in sizes:
            if size is not None:
                self.batches -= 1
                self.nbytes -= size
