"""One train loader as the loop sees it: resumed at any batch, replayed from a tape, without the excluded batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from stabletrain.runtime import rng
from stabletrain.runtime.data.exclusions import Exclusions
from stabletrain.runtime.data.fetch_counter import FetchCounter
from stabletrain.runtime.data.position import LoaderState, capture_start, position_in
from stabletrain.runtime.data.reader import LoaderReader
from stabletrain.runtime.data.resume_point import ResumePoint
from stabletrain.runtime.data.tape import EpochEnded, EpochStarted, IteratorStart, Tape, TapedBatch, TapeEvent, identity
from stabletrain.runtime.data.tape_limit import TapeLimit


class LoaderCursor(NamedTuple):
    """The loop's position in a loader, which it can be rewound to.

    Args:
        event: number of the first event on the tape that the loop has not seen.
        position: of the last batch that the loop got, within its epoch; -1 before the first.
        starts_epoch: whether a new iterator is created next.
        start: how the current iterator was created; None before the first one.
    """

    event: int
    position: int
    starts_epoch: bool
    start: IteratorStart | None


class TapedLoader(Iterator[Any]):
    """Stands between Lightning and a train loader; it is its own iterator.

    The loader's iterator is created at the first fetch of an epoch, after ``set_epoch`` of its samplers: Lightning
    creates it earlier if there are workers, and a resumed epoch would then have another epoch's order.

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
        self.cursor = self.cursor_before = LoaderCursor(0, -1, True, None)
        self.last_batch: TapedBatch | None = None
        self.samples_before: Any = None
        """The sample indices of the batch before the last one; None if unknown."""

    # ---- the loader's own attributes --------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "state_dict", "load_state_dict"):  # Lightning must not restore the loader's own position
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("worker_init_fn", "_iterator"):  # Lightning sets these for the loader
            setattr(self._loader, name, value)
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def loader(self) -> Any:
        """The wrapped loader."""
        return self._loader

    @property
    def tape(self) -> Tape:
        """The loader's events, as far as they are stored."""
        return self._tape

    # ---- iteration --------------------------------------------------------------------------------------------------

    def __iter__(self) -> TapedLoader:
        self._counter.reset()
        self.cursor = self.cursor._replace(starts_epoch=True)
        return self

    def __next__(self) -> Any:
        self._counter.on_next()
        while True:
            event = self._next_event()
            next_number = self._tape.next_number
            if isinstance(event, EpochStarted):
                self.cursor = LoaderCursor(next_number, event.position, False, event.start)
            elif isinstance(event, EpochEnded):
                self._counter.on_epoch_ended(event.position - self.cursor.position - 1)
                self.cursor = self.cursor._replace(event=next_number)
                raise StopIteration
            elif self._exclusions.cover(next_number - 1, event):
                self._excluded_in_replay = True
            else:
                excluded = event.position - self.cursor.position - 1
                self.cursor_before = self.cursor
                self.cursor = LoaderCursor(next_number, event.position, False, self.cursor.start)
                self.samples_before = None if self.last_batch is None else self.last_batch.samples
                self.last_batch = event
                self._counter.on_batch_returned(excluded, self.excluded_next())
                return event.batch

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

    def position(self, prefetched: bool, epoch_over: bool, unfinished: int) -> LoaderState:
        """The position of the run, for a checkpoint.

        Args:
            prefetched: whether a batch was fetched that the loop has not got yet.
            epoch_over: whether the epoch's last batch was trained on.
            unfinished: batches that the loop has got and has not finished.
        """
        cursor = self.cursor_before if prefetched else self.cursor
        if epoch_over or cursor.starts_epoch or cursor.start is None:
            epoch = self._reader.epoch if cursor.start is None else cursor.start.epoch + 1
            return position_in(self._loader, 0, capture_start(self._loader, epoch, None))
        batches = cursor.position + 1 - unfinished
        last, rng_before, identity_before = self.last_batch, None, None
        if last is not None and prefetched:
            rng_before = last.rng_before
        elif last is not None and last.samples is not None and not unfinished:
            identity_before = last.identity
        return position_in(self._loader, batches, cursor.start, rng_before, identity_before)

    @property
    def _epoch(self) -> int:
        return self._reader.epoch if self.cursor.start is None else self.cursor.start.epoch

    def _next_event(self) -> TapeEvent:
        event = self._replay()
        if event is not None:
            if event.rng_after is not None:
                rng.restore(event.rng_after)
            return event
        self._excluded_in_replay = False
        event = self._start_epoch() if self.cursor.starts_epoch else self._reader.fetch(self._tape.enabled)
        self._tape.record(event)
        self._limit.enforce(self._tape)
        return event

    def _replay(self) -> TapeEvent | None:
        event = self._tape.replay()
        while self.cursor.starts_epoch and event is not None and not isinstance(event, EpochStarted):
            self._excluded_in_replay = True  # the epoch ended early because its last batches are excluded
            event = self._tape.replay()
        if isinstance(event, EpochStarted) and self._excluded_in_replay and not isinstance(self._loader, Iterator):
            self._tape.next_number -= 1
            self._tape.truncate()  # its order was drawn after batches that are now excluded: draw it again
            return None
        return event

    def _start_epoch(self) -> EpochStarted:
        if self._exclusions.identities:
            self._exclusions.require_one_loader()
        return self._reader.start_epoch(self._resume.take(self), self._tape.enabled)
