"""Wraps a DataLoader's batch sampler, to know the samples of each batch and to omit batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple


class Indices(NamedTuple):
    """The sample indices of one batch.

    Args:
        position: of the batch within the epoch, from 0; excluded batches are counted.
        samples: the indices, as returned by the sampler.
    """

    position: int
    samples: Any


class IndexSampler(Iterator[Any]):
    """Numbers the index batches of a sampler, starts at any of them, and drops excluded ones before they are fetched.

    One iterator of the loader uses it at a time; ``iter()`` starts the next epoch.

    Args:
        sampler: the loader's batch sampler, or its sampler if it does not collate batches.
        excludes: whether a batch is excluded; None: no batch is, and the sampler is never read ahead.
    """

    def __init__(self, sampler: Iterable[Any], excludes: Callable[[Indices], bool] | None = None) -> None:
        self._sampler = sampler
        self.excludes = excludes
        self._start_at = self._first = self._drawn = 0
        self._source: Iterator[Any] = iter(())
        self._instead: Sequence[Any] | None = None
        self._last_skipped: Any = None
        self._ahead: Indices | None = None
        self._in_flight: deque[Indices] = deque()

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> IndexSampler:
        self._restart(iter(self._sampler if self._instead is None else self._instead))
        return self

    def __next__(self) -> Any:
        found = self._ahead or self._find()
        self._ahead = None
        if found is None:
            raise StopIteration
        self._in_flight.append(found)
        return found.samples

    @property
    def drawn(self) -> int:
        """How many index batches were drawn from the sampler in this epoch."""
        return self._drawn

    def start_at(self, position: int) -> None:
        """Skip the batches before ``position`` in the next epoch: draw their indices, do not fetch them."""
        self._start_at = position

    def draw_from(self, batches: Sequence[Any]) -> None:
        """Draw the next epoch from these index batches, and not from the sampler."""
        self._instead = batches

    def seek(self) -> Any:
        """Draw from the sampler up to the first batch to be fetched; returns the samples of the batch before it."""
        if self._ahead is None and not self._in_flight:
            self._ahead = self._find()
        return self._last_skipped

    def take(self) -> Indices:
        """Return the indices of the batch that the loader has just returned; call it once for each batch."""
        return self._in_flight.popleft()

    def next_position(self) -> int:
        """The position of the batch that the loader will return next; the number of batches if there is none."""
        for indices in self._in_flight:
            if not self._is_excluded(indices):
                return indices.position
        if self._ahead is None:
            self._ahead = self._find()
        return self._drawn if self._ahead is None else self._ahead.position

    def _restart(self, source: Iterator[Any]) -> None:
        self._source = source
        self._drawn = 0
        self._last_skipped = self._ahead = None
        self._in_flight.clear()
        self._first = self._start_at

    def _find(self) -> Indices | None:
        # these are for one epoch; not reset in __iter__, which a loader with processes calls twice for each
        self._instead, self._start_at = None, 0
        for samples in self._source:
            if type(samples) is list:
                samples = samples.copy()  # a sampler may fill one list again and again
            found = Indices(self._drawn, samples)
            self._drawn += 1
            if found.position < self._first:
                self._last_skipped = samples
            elif not self._is_excluded(found):
                return found
        return None

    def _is_excluded(self, indices: Indices) -> bool:
        return self.excludes is not None and self.excludes(indices)
