"""Keeps Lightning's batch counts right when batches are excluded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lightning.pytorch import Trainer

from stabletrain.runtime.internals import loader as loader_internals


class FetcherState(NamedTuple):
    """The counts of Lightning's fetcher.

    Args:
        fetched: batches of this epoch that it has fetched, or counted as excluded.
        done: whether it knows that no batch is left.
        counted_ahead: excluded batches after the current one that are included in ``fetched``.
        prefetched: batches that were fetched and that the loop had not taken.
    """

    fetched: int
    done: bool
    counted_ahead: int
    prefetched: int


class FetchCounter:
    """Tells Lightning's fetcher and batch progress about excluded batches: they count as completed.

    With a known length the fetcher recognizes the epoch's last batch by its count, so excluded batches are counted as
    soon as they are known to follow. Without one the fetcher prefetches a batch, and the excluded batches before it are
    counted when the loop takes it.

    Batches excluded at the end of an epoch are counted together with the last batch before them, whose batch_idx jumps
    ahead to that of the epoch's last batch. Otherwise Lightning would not validate at the end of the epoch, for which
    it compares batch_idx with ``val_check_interval``, and would later resume within an epoch that is over.

    Args:
        trainer: whose fetcher it is.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._counted_ahead = 0  # excluded batches after the current one that the fetcher has already counted
        self._uncounted = 0  # excluded batches before the prefetched one, not counted yet

    @property
    def prefetches(self) -> bool:
        """Whether the fetcher fetches a batch before the loop takes it: if the loader has no length."""
        fetcher = loader_internals.data_fetcher(self._trainer)
        return fetcher is not None and fetcher.length is None

    @property
    def counts_ahead(self) -> bool:
        """Whether excluded batches after the current one are counted; else a batch after no excluded one needs none."""
        return self._counted_ahead > 0

    def reset(self) -> None:
        """Start counting an epoch."""
        self._counted_ahead = self._uncounted = 0

    def on_next(self) -> None:
        """Called when the fetcher asks for a batch: if it prefetches, the loop takes the one before at this moment."""
        if self._uncounted:
            loader_internals.count_excluded(self._trainer, self._uncounted)
            self._uncounted = 0

    def on_batch_returned(self, excluded: int, excluded_next: int) -> None:
        """Called when the fetcher gets a batch.

        Args:
            excluded: number of batches excluded directly before it.
            excluded_next: number of batches that will be excluded directly after it.
        """
        if self.prefetches:
            self._uncounted = excluded
        else:
            self._count(excluded, excluded_next, current=1)

    def on_epoch_ended(self, excluded: int) -> None:
        """Called when the loader is exhausted: if the fetcher prefetches, the loop now takes the epoch's last batch.

        Args:
            excluded: number of batches excluded after that batch.
        """
        if self.prefetches:
            loader_internals.count_excluded(self._trainer, excluded)

    def state(self) -> FetcherState:
        """The counts now."""
        fetcher = loader_internals.data_fetcher(self._trainer)
        return FetcherState(
            fetcher.fetched, fetcher.done, self._counted_ahead, len(loader_internals.prefetched_by(fetcher))
        )

    def rewind(self, state: FetcherState, excluded_next: Callable[[], int] | None) -> None:
        """Return to an earlier state, after the loaders were rewound; prefetches again what was prefetched then.

        Args:
            state: from `state`.
            excluded_next: number of batches excluded directly after the current one; None: no batch is excluded.
        """
        fetcher, batches = loader_internals.data_fetcher(self._trainer), loader_internals.prefetched(self._trainer)
        fetcher.fetched, fetcher.done = state.fetched, state.done
        self._counted_ahead, self._uncounted = state.counted_ahead, 0
        batches.clear()
        try:
            while len(batches) < state.prefetched:
                batches.append(next(fetcher.iterator))
        except StopIteration:
            fetcher.done = not batches
        if fetcher.length is not None and excluded_next is not None and not state.done:
            self._count(0, excluded_next(), current=0)
            fetcher.done = fetcher.fetched >= fetcher.length
        if fetcher.done and not state.done:
            loader_internals.end_epoch_here(self._trainer)

    def _count(self, excluded: int, excluded_next: int, current: int) -> None:
        # current: 1 if the fetcher is about to count the batch that it gets, else 0
        fetcher = loader_internals.data_fetcher(self._trainer)
        fetcher.fetched += excluded - self._counted_ahead
        left = fetcher.length - fetcher.fetched - current
        excluded_next = min(excluded_next, left)  # with limit_train_batches, some may come after the end of the epoch
        fetcher.fetched += excluded_next
        self._counted_ahead = excluded_next
        if fetcher.fetched + current >= fetcher.length:
            excluded += excluded_next  # this batch becomes the epoch's last: no later batch would count them
        if excluded:
            loader_internals.count_excluded(self._trainer, excluded)
