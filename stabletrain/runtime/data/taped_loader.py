"""One train loader as the loop sees it: begun anew at any batch, replayed from a tape, batches left out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from stabletrain.runtime import rng
from stabletrain.runtime.data.index_sampler import IndexSampler, Indices
from stabletrain.runtime.data.position import LoaderState, position_in, restore_start, start_of, too_short
from stabletrain.runtime.data.tape import EpochEnded, EpochStarted, IteratorStart, Tape, TapedBatch, TapeEvent, identity
from stabletrain.runtime.internals import loader as loader_internals

if TYPE_CHECKING:
    from stabletrain.runtime.data.train_loader import TrainLoader


class LoaderCursor(NamedTuple):
    """Where the loop stands in a loader, to go back to.

    Args:
        event: number of the first event that the loop has not seen.
        handed: position of the last batch that the loop was given, -1 before the first.
        begins: whether a new iterator is to be made next.
        start: how the current iterator began.
    """

    event: int
    handed: int
    begins: bool
    start: IteratorStart | None


class TapedLoader(Iterator[Any]):
    """Stands between Lightning and a train loader; it is its own iterator.

    The loader's iterator is made at the first fetch of an epoch, after samplers were told the epoch: Lightning makes
    it too early where there are workers, and the resumed epoch would have another epoch's order.

    Args:
        loader: the loader, as Lightning has processed it.
        owner: what all train loaders of the trainer share.
    """

    def __init__(self, loader: Any, owner: TrainLoader) -> None:
        self._loader = loader
        self._owner = owner
        self._tap = (
            IndexSampler(loader_internals.index_sampler(loader))
            if loader_internals.takes_index_sampler(loader)
            else None
        )
        self._in_process = not (isinstance(loader, DataLoader) and loader.num_workers > 0)
        self._tape = Tape()
        self._source: Iterator[Any] | None = None
        self._fetched = 0
        self._draws = False  # the loader was seen to draw from the global generators
        self._opens = False  # its iterator has not fetched yet
        self._diverged = False  # a batch of the tape was left out, so what followed it may not follow again
        self._fetch_with: rng.RngState | None = None
        self.cursor = self.cursor_before = LoaderCursor(0, -1, True, None)
        self.last: TapedBatch | None = None

    # ---- what others see of the loader ------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name in ("_loader", "state_dict", "load_state_dict"):  # the position is ours to keep, not the loader's
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("worker_init_fn", "_iterator"):  # Lightning sets these: they are meant for the loader
            setattr(self._loader, name, value)
        else:
            super().__setattr__(name, value)

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def loader(self) -> Any:
        """The loader itself."""
        return self._loader

    @property
    def tape(self) -> Tape:
        """What the loader did, as far as it is kept."""
        return self._tape

    # ---- handing out ------------------------------------------------------------------------------------------------

    def __iter__(self) -> TapedLoader:
        self._owner.on_iter()
        self.cursor = self.cursor._replace(begins=True)
        return self

    def __next__(self) -> Any:
        self._owner.on_next()
        while True:
            event = self._next_event()
            number = self._tape.head - 1
            if isinstance(event, EpochStarted):
                self.cursor = LoaderCursor(self._tape.head, event.handed, False, event.start)
            elif isinstance(event, EpochEnded):
                self.cursor = self.cursor._replace(event=self._tape.head)
                raise StopIteration
            elif self._excludes(number, event):
                self._diverged = True
            else:
                excluded = event.position - self.cursor.handed - 1
                self.cursor_before = self.cursor
                self.cursor = LoaderCursor(self._tape.head, event.position, False, self.cursor.start)
                self.last = event
                self._owner.on_batch_returned(excluded, self.excluded_next())
                return event.batch

    def rewind(self, place: LoaderCursor) -> None:
        """Go back: what happened since will happen again, without what is left out."""
        self._tape.head = place.event
        self._diverged = False
        self.cursor = place

    def excluded_next(self) -> int:
        """How many batches directly after the one handed out last will be left out."""
        if not self._owner.excludes_any:
            return 0
        last = handed = self.cursor.handed
        for number in range(self._tape.head, self._tape.end):
            event = self._tape[number]
            if isinstance(event, EpochStarted):
                return last - handed
            if isinstance(event, EpochEnded) or not self._excludes(number, event):
                return event.position - handed - 1
            last = event.position
        if self._tap is not None and self._source is not None:
            self._tap.excludes = self._excludes_indices
            return self._tap.next_position() - handed - 1
        while self._owner.excludes(identity(self.epoch, last + 1, None)):
            last += 1
        return last - handed

    @property
    def epoch(self) -> int:
        """The epoch of the current iterator."""
        return (
            self.cursor.start.epoch
            if self.cursor.start is not None
            else loader_internals.epoch_number(self._owner.trainer)
        )

    def position(self, ahead: bool, over: bool, unfinished: int) -> LoaderState:
        """Where the run stands.

        Args:
            ahead: a batch was fetched that the loop has not been given.
            over: the epoch's last batch was trained on.
            unfinished: batches that the loop was given and has not finished.
        """
        cursor = self.cursor_before if ahead else self.cursor
        if over or cursor.begins or cursor.start is None:
            epoch = (
                loader_internals.epoch_number(self._owner.trainer) if cursor.start is None else cursor.start.epoch + 1
            )
            return position_in(self._loader, 0, start_of(self._loader, epoch, None))
        items = cursor.handed + 1 - unfinished
        before = self.last.rng_before if ahead and self.last is not None else None
        known = self.last is not None and self.last.samples is not None and not ahead and not unfinished
        last = self.last.identity if known and self.last is not None else None
        return position_in(self._loader, items, cursor.start, before, last)

    # ---- events, replayed or new ------------------------------------------------------------------------------------

    def _next_event(self) -> TapeEvent:
        event = self._replay()
        if event is not None:
            if event.rng_after is not None:
                rng.restore(event.rng_after)
            return event
        self._diverged = False
        event = self._begin() if self.cursor.begins else self._fetch()
        self._tape.record(event, self._owner.keeps_tape)
        return event

    def _replay(self) -> TapeEvent | None:
        event = self._tape.replay()
        while self.cursor.begins and event is not None and not isinstance(event, EpochStarted):
            self._diverged = True  # the last batches of the epoch were left out
            event = self._tape.replay()
        if isinstance(event, EpochStarted) and self._diverged and not isinstance(self._loader, Iterator):
            self._tape.head -= 1
            self._tape.cut()  # this epoch's order was drawn in a past that is no more
            return None
        return event

    def _begin(self) -> EpochStarted:
        position = self._owner.take_position(self)
        handed = -1
        if position is None or position.start.rng is None:
            self._owner.before_rng_use()
            epoch = loader_internals.epoch_number(self._owner.trainer)
            if position is not None:
                self._start_workers(position.start)
                restore_start(position.start, self._loader)
                epoch = position.start.epoch
            start = start_of(self._loader, epoch, rng.capture())
            self.cursor = self.cursor._replace(start=start)
            self._open(0)
        else:
            start, handed = position.start, position.items - 1
            self.cursor = self.cursor._replace(start=start)
            with rng.kept():
                self._start_workers(start)
                restore_start(start, self._loader)
                self._pass_over(position)
            self._fetch_with = position.rng_before
        return EpochStarted(start, handed, rng.capture(cuda=False) if self._owner.keeps_tape else None)

    def _start_workers(self, start: IteratorStart) -> None:
        if start.kept_workers and not loader_internals.has_kept_workers(self._loader):
            rank_zero_warn(
                "resume_exactly: the loader's persistent workers are new processes: if its dataset draws random "
                "numbers, they are others from here on. Set persistent_workers=False for an exact resume of those."
            )
            with rng.kept():
                self._open(0)  # the iterator that comes next is then not the first, and draws what it drew

    def _open(self, at: int) -> None:
        self._fetched, self._opens = at, True
        if self._tap is None:
            self._source = iter(self._loader)
            return
        self._tap.excludes = self._excludes_indices if self._owner.excludes_any else None
        self._tap.begin_at(at)
        self._source = loader_internals.iterate_through(self._loader, self._tap)

    def _pass_over(self, position: LoaderState) -> None:
        if self._tap is not None and self._owner.passes_over_indices(self._in_process):
            self._open(position.items)
            before = self._tap.reach()
            if self._tap.asked < position.items:
                raise too_short(position, self._tap.asked)
        else:
            before = None
            self._open(0)
            if self._tap is not None:
                self._tap.excludes = None
            for count in range(position.items):
                try:
                    next(self._source)  # type: ignore[arg-type]
                except StopIteration:
                    raise too_short(position, count) from None
                before = self._tap.take().samples if self._tap is not None else None
            self._fetched = position.items
        position.compare_last(before)

    def _fetch(self) -> TapeEvent:
        if self._source is None:
            raise StopIteration
        if self._fetch_with is not None:  # it was fetched ahead of the step after which the checkpoint was made
            state, self._fetch_with = self._fetch_with, None
            with rng.kept():
                rng.restore(state)
                return self._fetch_now()
        self._owner.before_rng_use()
        event = self._fetch_now()
        self._owner.after_fetch()
        return event

    def _fetch_now(self) -> TapedBatch | EpochEnded:
        before = rng.capture() if self._in_process and self._owner.notes_rng_before_fetch else None
        watches = self._in_process and self._owner.keeps_tape
        opens, self._opens = self._opens, False  # a sampler's iterator draws its seed at its first index
        mark = rng.fingerprint() if watches and not self._draws and not opens else None
        try:
            batch = next(self._source)  # type: ignore[arg-type]
        except StopIteration:
            self._source = None
        if mark is not None:
            self._draws = rng.fingerprint() != mark
        after = rng.capture(cuda=False) if watches and (self._draws or opens) else None
        if self._source is None:
            return EpochEnded(self._tap.asked if self._tap is not None else self._fetched, after)
        position, samples = self._tap.take() if self._tap is not None else (self._fetched, None)
        self._fetched = position + 1
        return TapedBatch(batch, self.epoch, position, samples, before, after)

    def _excludes(self, number: int, item: TapedBatch) -> bool:
        owner = self._owner
        return owner.excludes_any and (
            owner.excludes_event(number) or owner.excludes(item.identity) or owner.excludes(item.position_key)
        )

    def _excludes_indices(self, indices: Indices) -> bool:
        here = self.epoch, indices.position
        return self._owner.excludes(identity(*here, indices.samples)) or self._owner.excludes(identity(*here, None))
