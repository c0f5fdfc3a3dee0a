"""Creates the iterators of one train loader, at any batch of an epoch, and fetches batches from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from stabletrain.runtime import rng
from stabletrain.runtime.data.exclusions import Exclusions
from stabletrain.runtime.data.fetch_counter import FetchCounter
from stabletrain.runtime.data.global_order import dealt_batches, dealt_out, order_of, why_not_continued
from stabletrain.runtime.data.index_sampler import IndexSampler, Indices
from stabletrain.runtime.data.position import (
    LoaderState,
    capture_generators,
    capture_start,
    epoch_indices,
    length_mismatch,
    order_mismatch,
    own_generators,
    restore_own,
    restore_start,
)
from stabletrain.runtime.data.resume_point import ResumePoint
from stabletrain.runtime.data.shared_memory import copy_shared_tensors
from stabletrain.runtime.data.tape import EpochEnded, EpochStarted, IteratorStart, TapedBatch, identity
from stabletrain.runtime.internals import loader as loader_internals


class LoaderReader:
    """Reads one loader: one iterator after another, each an epoch.

    Args:
        loader: the loader, as Lightning has set it up.
        trainer: the trainer that reads from it.
        exclusions: the batches that are not fetched, if the loader takes an index sampler.
        resume: options of a resumed run.
        counter: of the fetcher that reads from the loader.
    """

    def __init__(
        self, loader: Any, trainer: Trainer, exclusions: Exclusions, resume: ResumePoint, counter: FetchCounter
    ) -> None:
        self._loader = loader
        self._trainer = trainer
        self._exclusions, self._resume, self._counter = exclusions, resume, counter
        self.index_sampler = (
            IndexSampler(loader_internals.index_sampler(loader))
            if loader_internals.takes_index_sampler(loader)
            else None
        )
        self._in_process = not (isinstance(loader, DataLoader) and loader.num_workers > 0)
        self._may_share = not (isinstance(loader, DataLoader) and loader.num_workers == 0)
        self._generators = own_generators(loader)
        self.iterator: Iterator[Any] | None = None
        self._start: IteratorStart | None = None
        self._fetched = 0
        self._draws_rng = False  # whether a fetch was seen to draw from the global generators
        self._is_first_fetch = False
        self._rng_of_next: rng.RngState | None = None  # the generators to fetch the next batch with

    def own_states(self) -> list[Tensor]:
        """The states of the loader's own generators."""
        return [generator.get_state() for generator in self._generators]

    @property
    def epoch(self) -> int:
        """The epoch of the iterator, or the trainer's before the first one."""
        return self._start.epoch if self._start is not None else loader_internals.epoch_number(self._trainer)

    @property
    def shared(self) -> bool:
        """Whether all ranks read the same batches, as under tensor parallelism."""
        return loader_internals.all_ranks_read_alike(self._trainer)

    def start_epoch(self, position: LoaderState | None, record_rng: bool) -> EpochStarted:
        """Create an iterator.

        Args:
            position: where it starts; None: at the first batch of the trainer's epoch.
            record_rng: whether the event records the state of the generators after it.

        Raises:
            UserError: if the loader does not reach the position, or has other samples before it.
        """
        last = -1
        if position is None or position.start.rng is None:
            epoch = loader_internals.epoch_number(self._trainer)
            if position is not None:
                self._start_workers(position.start)
                restore_start(position.start, self._loader)
                epoch = position.start.epoch
            self._start = capture_start(self._loader, epoch, rng.capture(), self.shared)
            self._open(0)
        else:
            self._start, last = position.start, position.batches - 1
            with rng.preserved():
                self._start_workers(position.start)
                restore_start(position.start, self._loader)
                self._draw_from_foreign_order(position.start)
                if position.batches:
                    self._skip_to(position)
                else:
                    self._open(0)
            self._rng_of_next = position.rng_before
        return EpochStarted(self._start, last, rng.capture_quickly(cuda=False) if record_rng else None)

    def fetch(self, record_rng: bool) -> TapedBatch | EpochEnded:
        """Fetch the next batch from the iterator.

        Args:
            record_rng: whether the event records the state of the generators after it, if it drew from them.

        Raises:
            StopIteration: if the iterator was exhausted before.
        """
        if self.iterator is None:
            raise StopIteration
        if self._rng_of_next is not None:  # it was prefetched before the checkpoint's last step: draw the same again
            state, self._rng_of_next = self._rng_of_next, None
            with rng.preserved():
                rng.restore(state)
                return self._fetch(record_rng)
        event = self._fetch(record_rng)
        self._resume.after_fetch()
        return event

    def next_position(self) -> int | None:
        """The position of the next batch that is not excluded; None if the loader takes no index sampler."""
        if self.index_sampler is None or self.iterator is None:
            return None
        self.index_sampler.excludes = self._excludes
        return self.index_sampler.next_position()

    @property
    def can_fetch_again(self) -> bool:
        """Whether batches can be fetched by their samples, as they were: by this process, without random numbers."""
        return self._in_process and self.index_sampler is not None and not self._draws_rng

    def fetch_again(self, samples: Any) -> Any:
        """Fetch a batch by its samples; random generators, and what is fetched next, stay as they are."""
        own = self.own_states()
        with rng.preserved():
            batch = next(loader_internals.iterate_with(self._loader, [samples]))
        restore_own(own, self._loader)
        return batch

    def close(self) -> None:
        """Drop the iterator, and end its worker processes."""
        iterator, self.iterator = self.iterator, None
        loader_internals.stop_workers(self._loader, iterator)

    def _start_workers(self, start: IteratorStart) -> None:
        if start.reuses_workers and not loader_internals.reuses_workers(self._loader):
            self._resume.warn(
                "the loader's persistent workers are new processes: if the dataset draws random numbers in them, these "
                "differ from here on. Set persistent_workers=False to resume exactly."
            )
            with rng.preserved():
                self._open(0)  # so that the next iterator reuses workers, as at the checkpoint, and draws as many seeds

    def _open(self, position: int) -> None:
        self.close()
        self._fetched, self._is_first_fetch = position, True
        if self.index_sampler is None:
            self.iterator = iter(self._loader)
            return
        self.index_sampler.excludes = self._excludes if self._exclusions else None
        self.index_sampler.start_at(position)
        self.iterator = loader_internals.iterate_with(self._loader, self.index_sampler)

    def _draw_from_foreign_order(self, start: IteratorStart) -> None:
        """End an epoch that another number of ranks has begun."""
        if start.order is None or not start.order.is_foreign:
            return
        problem = why_not_continued(start.order, self._loader, self.shared)
        if problem:
            self._resume.warn_of_other_samples(problem)
            self._start = start._replace(order=order_of(self._loader, self._generators, self.shared))
        elif self.index_sampler is not None:
            dealt = dealt_out(self._loader, self.shared)
            assert dealt is not None
            self._start = start._replace(order=start.order._replace(readers=dealt[0]))
            self.index_sampler.draw_from(dealt_batches(epoch_indices(start), self._loader, self.shared))

    def _skip_to(self, position: LoaderState) -> None:
        if self.index_sampler is not None and self._resume.skips_fetching(self._in_process):
            self._open(position.batches)
            self._restore_first(position.start)
            last = self.index_sampler.seek()
            if self.index_sampler.drawn < position.batches:
                raise self._resume.mismatch(length_mismatch(position, self.index_sampler.drawn))
        else:
            last = None
            self._open(0)
            self._restore_first(position.start)
            if self.index_sampler is not None:
                self.index_sampler.excludes = None
            for count in range(position.batches):
                try:
                    next(self.iterator)  # type: ignore[arg-type]
                except StopIteration:
                    raise self._resume.mismatch(length_mismatch(position, count)) from None
                last = self.index_sampler.take().samples if self.index_sampler is not None else None
            self._fetched = position.batches
        problem = order_mismatch(position, last)
        if problem:
            raise self._resume.mismatch(problem)

    def _restore_first(self, start: IteratorStart) -> None:
        self._is_first_fetch = False
        if start.first is not None:
            rng.restore(start.first.rng)
            restore_own(start.first.own, self._loader)

    def _fetch(self, record_rng: bool) -> TapedBatch | EpochEnded:
        before = first = mark = after = None
        # a sampler's iterator draws its seed at the first fetch, whether or not later fetches draw
        is_first, self._is_first_fetch = self._is_first_fetch, False
        if self._in_process:
            if self._resume.enabled:
                before = rng.capture_quickly() if self._counter.prefetches else None
                first = capture_generators(self._loader) if is_first else None
            if record_rng and not self._draws_rng:
                if not is_first:
                    mark = before or rng.capture_quickly(cuda=False)
                elif self.index_sampler is not None:
                    self.index_sampler.seek()  # draws its seed, so that what is seen are the dataset's own draws
                    mark = rng.capture_quickly(cuda=False)
        try:
            batch = next(self.iterator)  # type: ignore[arg-type]
        except StopIteration:
            self.iterator = None
        if record_rng and self._in_process:
            now = rng.capture_quickly(cuda=False)
            if mark is not None:
                self._draws_rng = mark.was_drawn_from(now)
            after = now if self._draws_rng or is_first else None
        if self.iterator is None:
            return EpochEnded(self.index_sampler.drawn if self.index_sampler is not None else self._fetched, after)
        position, samples = self.index_sampler.take() if self.index_sampler is not None else (self._fetched, None)
        self._fetched = position + 1
        if record_rng and self._may_share:  # the batch is stored
            batch = copy_shared_tensors(batch)
        return TapedBatch(batch, self.epoch, position, samples, before, after, first)

    def _excludes(self, indices: Indices) -> bool:
        by_samples = identity(self.epoch, indices.position, indices.samples)
        by_position = identity(self.epoch, indices.position, None)
        return self._exclusions.cover_identity(by_samples) or self._exclusions.cover_identity(by_position)
