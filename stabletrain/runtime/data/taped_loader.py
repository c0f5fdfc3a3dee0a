"""One train loader as the loop sees it: resumed at any batch, replayed from a tape, without the excluded batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from lightning.pytorch import Trainer
from torch import Tensor

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.data.exclusions import Exclusions
from stabletrain.runtime.data.fetch_counter import FetchCounter
from stabletrain.runtime.data.fetched_again import FetchedAgain, outline
from stabletrain.runtime.data.position import LoaderState, capture_start, position_in
from stabletrain.runtime.data.reader import LoaderReader
from stabletrain.runtime.data.resume_point import ResumePoint
from stabletrain.runtime.data.tape import EpochEnded, EpochStarted, IteratorStart, Tape, TapedBatch, TapeEvent, identity
from stabletrain.runtime.data.tape_limit import TapeLimit

_E = TypeVar("_E", bound=TapeEvent)


class LoaderCursor(NamedTuple):
    """The loop's position in a loader, which it can be rewound to.

    Args:
        event: number of the first event on the tape that the loop has not seen.
        position: of the last batch that the loop got, within its epoch; -1 before the first.
        start: how the current iterator was created; None before the first one.
    """

    event: int
    position: int
    start: IteratorStart | None


class LoaderPlace(NamedTuple):
    """What the loader's position at this moment follows from, which takes no time to keep.

    Args:
        cursor: the loop's position.
        cursor_before: one batch earlier.
        last_batch: the last batch that the loop got.
        own: states of the loader's own generators.
    """

    cursor: LoaderCursor
    cursor_before: LoaderCursor
    last_batch: TapedBatch | None
    own: list[Tensor]


class TapedLoader(Iterator[Any]):
    """Stands between Lightning and a train loader; it is its own iterator.

    The loader's iterator is created when Lightning calls ``iter()``, as without this class: a DataLoader draws its
    workers' seed then, before another loader's iterator is created.

    Args:
        loader: the loader, as Lightning has set it up.
        trainer: the trainer that reads from it.
        exclusions: the batches that the loop does not get.
        resume: where the first iterator of a resumed run starts.
        counter: counts the excluded batches for Lightning.
        limit: of the tape.
    """

    def __init__(
        self,
        loader: Any,
        trainer: Trainer,
        exclusions: Exclusions,
        resume: ResumePoint,
        counter: FetchCounter,
        limit: TapeLimit,
    ) -> None:
        self._loader = loader
        self._exclusions, self._resume, self._counter, self._limit = exclusions, resume, counter, limit
        self._reader = LoaderReader(loader, trainer, exclusions, resume, counter)
        self._tape = Tape()
        self._excluded_in_replay = False  # whether a batch was excluded since the rewind, so that later epochs differ
        self.cursor = self.cursor_before = LoaderCursor(0, -1, None)
        self.last_batch: TapedBatch | None = None
        self._problem: UserError | None = (
            None  # raised at the first fetch: an error in iter() breaks Lightning's teardown
        )
        self.samples_before: Any = None
        """The sample indices of the batch before the last one; None if unknown."""
        self.on_other_content: Callable[[], None] | None = None
        """See `TrainLoader.keep_tape`."""

    # ---- the loader's own attributes --------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "state_dict", "load_state_dict"):  # Lightning must not restore the loader's own position
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    def worker_init_fn(self) -> Any:
        """The loader's, which Lightning sets. Not by ``__setattr__``, which would cost 2 µs a batch."""
        return self._loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, value: Any) -> None:
        self._loader.worker_init_fn = value

    @property
    def _iterator(self) -> Any:
        return self._loader._iterator

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._loader._iterator = value
        if value is None:  # at the end of a fit, with or without an error
            self.close()

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def loader(self) -> Any:
        """The wrapped loader."""
        return self._loader

    @property
    def can_fetch_again(self) -> bool:
        """Whether the last batches could be fetched again by their samples, as they were."""
        return self._reader.can_fetch_again

    @property
    def tape(self) -> Tape:
        """The loader's events, as far as they are stored."""
        return self._tape

    def close(self) -> None:
        """Nothing is fetched any more until ``iter()`` is called again: end the worker processes."""
        self._reader.close()

    # ---- iteration --------------------------------------------------------------------------------------------------

    def __iter__(self) -> TapedLoader:
        self._counter.reset()
        event = self._replay_start()
        if event is None:
            self._excluded_in_replay = False
            try:
                event = self._record(self._start_epoch())
            except UserError as error:
                self._problem = error
                return self
        self.cursor = LoaderCursor(self._tape.next_number, event.position, event.start)
        return self

    def __next__(self) -> Any:
        if self._problem is not None:
            raise self._problem
        self._counter.on_next()
        while True:
            event = self._next_event()
            next_number = self._tape.next_number
            if isinstance(event, EpochEnded):
                self._counter.on_epoch_ended(max(0, event.position - self.cursor.position - 1))
                self.cursor = self.cursor._replace(event=next_number)
                raise StopIteration
            start = self.cursor.start
            if event.first is not None and start is not None:
                start = start._replace(first=event.first)
            if self._exclusions and self._exclusions.cover(next_number - 1, event):
                self._excluded_in_replay = True
                self.cursor = self.cursor._replace(start=start)
            else:
                # it comes earlier than the last one if a validation has begun the same persistent iterator anew
                excluded = max(0, event.position - self.cursor.position - 1)
                self.cursor_before = self.cursor
                self.cursor = LoaderCursor(next_number, event.position, start)
                self.samples_before = None if self.last_batch is None else self.last_batch.samples
                self.last_batch = event
                if excluded or self._exclusions or self._counter.counts_ahead:
                    self._counter.on_batch_returned(excluded, self.excluded_next())
                return self._again(event) if type(event.batch) is FetchedAgain else event.batch

    def rewind(self, cursor: LoaderCursor) -> None:
        """Go back: the batches since then are replayed, without the excluded ones."""
        self._tape.next_number = cursor.event
        self._excluded_in_replay = False
        self.cursor = cursor
        before = self._tape[cursor.event - 1] if cursor.event > self._tape.first else None
        self.last_batch = self.samples_before = None
        if isinstance(before, TapedBatch) and before.position == cursor.position:
            self.last_batch = before

    def excluded_next(self) -> int:
        """How many batches directly after the last one that the loop got will be excluded."""
        if not self._exclusions:
            return 0
        last = current = self.cursor.position
        for number in range(self._tape.next_number, self._tape.end):
            event = self._tape[number]
            if isinstance(event, EpochStarted):
                return last - current
            if isinstance(event, EpochEnded) or not self._exclusions.cover(number, event):
                return event.position - current - 1
            last = event.position
        next_position = self._reader.next_position()
        if next_position is not None:
            return next_position - current - 1
        while self._exclusions.cover_identity(identity(self._epoch, last + 1, None)):
            last += 1
        return last - current

    @property
    def place(self) -> LoaderPlace:
        """Where the loop is now, for `position`."""
        return LoaderPlace(self.cursor, self.cursor_before, self.last_batch, self._reader.own_states())

    def position(self, place: LoaderPlace, prefetched: bool, epoch_over: bool) -> LoaderState:
        """The position of the run, for a checkpoint.

        Args:
            place: of the run, between two batches.
            prefetched: whether a batch was fetched that the loop had not got yet.
            epoch_over: whether the epoch's last batch was trained on.
        """
        cursor, last = place.cursor_before if prefetched else place.cursor, place.last_batch
        if epoch_over or cursor.start is None:
            epoch = self._reader.epoch if cursor.start is None else cursor.start.epoch + 1
            start = capture_start(self._loader, epoch, None, self._reader.shared)._replace(generators=place.own)
            return position_in(self._loader, 0, start, own=place.own)
        rng_before = None
        if last is not None and last.rng_before is not None and prefetched:
            rng_before = last.rng_before.to_state()
        known = last is not None and last.samples is not None and not prefetched and cursor.position >= 0
        name = last.identity if known and last else None
        return position_in(self._loader, cursor.position + 1, cursor.start, rng_before, name, place.own)

    @property
    def _epoch(self) -> int:
        return self._reader.epoch if self.cursor.start is None else self.cursor.start.epoch

    def _next_event(self) -> TapedBatch | EpochEnded:
        event = self._tape.replay()
        if isinstance(event, EpochStarted):  # the loop goes on where it ended an epoch early before the rewind
            self._tape.next_number -= 1
            raise StopIteration
        if event is None:
            self._excluded_in_replay = False
            return self._record(self._reader.fetch(self._tape.enabled))
        if event.rng_after is not None:
            rng.restore(event.rng_after.to_state())
        return event

    def _record(self, event: _E) -> _E:
        again = self.on_other_content is not None and self._tape.enabled and self.can_fetch_again
        if again and isinstance(event, TapedBatch) and event.rng_after is None:
            self._tape.record(event._replace(batch=FetchedAgain(outline(event.batch))))
        else:
            self._tape.record(event)
        self._limit.enforce(self._tape)
        return event

    def _again(self, event: TapedBatch) -> Any:
        """Fetch a batch again that is not stored."""
        batch = self._reader.fetch_again(event.samples)
        if self.on_other_content is not None and outline(batch) != event.batch.outline:
            self.on_other_content()
        return batch

    def _replay_start(self) -> EpochStarted | None:
        """The start of the next epoch on the tape; None if it is created anew."""
        event = self._tape.replay()
        while event is not None and not isinstance(event, EpochStarted):
            self._excluded_in_replay = True  # the epoch ended early because its last batches are excluded
            event = self._tape.replay()
        if event is None:
            return None
        if self._excluded_in_replay and not isinstance(self._loader, Iterator):
            self._tape.next_number -= 1
            self._tape.truncate()  # its order was drawn after batches that are now excluded: draw it again
            return None
        if event.rng_after is not None:
            rng.restore(event.rng_after.to_state())
        return event

    def _start_epoch(self) -> EpochStarted:
        if self._exclusions.identities:
            self._exclusions.require_one_loader()
        return self._reader.start_epoch(self._resume.take(self), self._tape.enabled)
