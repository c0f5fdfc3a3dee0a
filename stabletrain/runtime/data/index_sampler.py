"""Knowing which samples a batch holds: a stand-in for a DataLoader's batch sampler."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple


class Indices(NamedTuple):
    """What the sampler asked for: the indices of one batch.

    Args:
        position: of the batch within the epoch, from 0; batches left out are counted.
        samples: the indices, as the sampler gave them.
    """

    position: int
    samples: Any


class IndexSampler(Iterator[Any]):
    """Numbers the index batches of a sampler, begins at any of them, and leaves some out before they are fetched.

    One iterator of the loader uses it at a time; ``iter()`` begins the next epoch.

    Args:
        sampler: the loader's batch sampler, or its sampler where batches are not collated.
        excludes: whether a batch is not wanted; None: none is left out, and the sampler is never read ahead.
    """

    def __init__(self, sampler: Iterable[Any], excludes: Callable[[Indices], bool] | None = None) -> None:
        self._sampler = sampler
        self.excludes = excludes
        self._begin_at = self._first = self._asked = 0
        self._source: Iterator[Any] = iter(())
        self._passed: Any = None
        self._ahead: Indices | None = None
        self._under_way: deque[Indices] = deque()

    def __getattr__(self, name: str) -> Any:
        if name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)  # type: ignore[arg-type]

    def __iter__(self) -> IndexSampler:
        self._restart(iter(self._sampler))
        return self

    def __next__(self) -> Any:
        found = self._ahead or self._find()
        self._ahead = None
        if found is None:
            raise StopIteration
        self._under_way.append(found)
        return found.samples

    @property
    def asked(self) -> int:
        """How many index batches the sampler has given in this epoch."""
        return self._asked

    def begin_at(self, position: int) -> None:
        """Pass over the batches before ``position`` when the next epoch begins, without fetching them."""
        self._begin_at = position

    def reach(self) -> Any:
        """Draw from the sampler up to the first batch that is wanted; returns the samples of the batch before it."""
        if self._ahead is None and not self._under_way:
            self._ahead = self._find()
        return self._passed

    def take(self) -> Indices:
        """The indices of the batch that the loader has just given."""
        return self._under_way.popleft()

    def next_position(self) -> int:
        """The position of the batch that the loader will give next; the number of batches if there is none."""
        for indices in self._under_way:
            if not self._unwanted(indices):
                return indices.position
        if self._ahead is None:
            self._ahead = self._find()
        return self._asked if self._ahead is None else self._ahead.position

    def _restart(self, source: Iterator[Any]) -> None:
        self._source = source
        self._asked = 0
        self._passed = self._ahead = None
        self._under_way.clear()
        self._first, self._begin_at = self._begin_at, 0

    def _find(self) -> Indices | None:
        for samples in self._source:
            found = Indices(self._asked, samples)
            self._asked += 1
            if found.position < self._first:
                self._passed = samples
            elif not self._unwanted(found):
                return found
        return None

    def _unwanted(self, indices: Indices) -> bool:
        return self.excludes is not None and self.excludes(indices)
