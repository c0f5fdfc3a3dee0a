"""What a train loader did, in order: enough to do it once more, for any iterable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from stabletrain.runtime.rng import RngState

Identity: TypeAlias = tuple[Any, ...]
"""Names a batch across restarts: ``("samples", 4, 17, ...)`` by sample indices, else ``("batch", epoch, position)``."""


class IteratorStart(NamedTuple):
    """How an iterator of the loader began: enough to begin it once more, in another process too.

    Args:
        epoch: of the run, from 0.
        rng: the global generators just before it was made; None where it is yet to be made.
        generators: states of the loader's and its samplers' own generators.
        sampler_epoch: what the sampler was told by ``set_epoch``, if it has that.
        sampler_seed: the seed of a sampler whose order is a function of seed and epoch.
        kept_workers: it uses the worker processes of an earlier iterator.
    """

    epoch: int
    rng: RngState | None
    generators: list[Tensor]
    sampler_epoch: int | None = None
    sampler_seed: int | None = None
    kept_workers: bool = False


class EpochStarted(NamedTuple):
    """An iterator of the loader was made.

    Args:
        start: how.
        handed: position of the last batch that was passed over, -1 for none.
        rng_after: the generators afterwards.
    """

    start: IteratorStart
    handed: int
    rng_after: RngState | None


class TapedBatch(NamedTuple):
    """A batch was fetched.

    Args:
        batch: as the loader gave it, on the host.
        epoch: of the run, from 0.
        position: within the epoch, from 0; batches left out are counted.
        samples: the indices that the sampler asked for; None where no sampler gives them.
        rng_before: the generators before the fetch, where somebody needs them.
        rng_after: the generators after the fetch; None if it drew nothing.
    """

    batch: Any
    epoch: int
    position: int
    samples: Any = None
    rng_before: RngState | None = None
    rng_after: RngState | None = None

    @property
    def identity(self) -> Identity:
        """The batch's name."""
        return identity(self.epoch, self.position, self.samples)

    @property
    def position_key(self) -> Identity:
        """The batch's name by its place, which is the same on all ranks."""
        return identity(self.epoch, self.position, None)


class EpochEnded(NamedTuple):
    """The iterator had no more.

    Args:
        position: how many batches there were; those left out are counted.
        rng_after: the generators afterwards; None if nothing was drawn.
    """

    position: int
    rng_after: RngState | None


TapeEvent: TypeAlias = EpochStarted | TapedBatch | EpochEnded


def identity(epoch: int, position: int, samples: Any) -> Identity:
    """Name a batch by its samples where they are numbers or strings, else by its place.

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


class Tape:
    """Events by number, of which the last ones are kept, and a head that replays them or stands at the end."""

    def __init__(self) -> None:
        self.head = 0
        self._first = 0
        self._events: list[TapeEvent] = []

    @property
    def end(self) -> int:
        """The number of the next new event."""
        return self._first + len(self._events)

    @property
    def first(self) -> int:
        """The number of the oldest event kept."""
        return self._first

    def __getitem__(self, number: int) -> TapeEvent:
        return self._events[number - self._first]

    def replay(self) -> TapeEvent | None:
        """The event at the head, which moves on; None at the end of the tape."""
        if self.head >= self.end:
            return None
        self.head += 1
        return self[self.head - 1]

    def record(self, event: TapeEvent, keep: bool) -> None:
        """A new event happened; without ``keep`` it is counted and forgotten, and so are all before it."""
        self._events.append(event)
        self.head = self.end
        if not keep:
            self.forget_before(self.end)

    def forget_before(self, number: int) -> None:
        """Let go of older events."""
        number = min(number, self.head)
        del self._events[: max(0, number - self._first)]
        self._first = max(self._first, number)

    def cut(self) -> None:
        """Forget what was recorded beyond the head: it will not happen again."""
        del self._events[self.head - self._first :]
