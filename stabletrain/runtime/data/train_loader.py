"""The train loader of a Trainer, shared by whoever resumes exactly or goes back in time.

    loader = TrainLoader.of(trainer)         # in setup(); close() when done
    loader.keep_tape()                       # from now on what is fetched is remembered
    mark = loader.mark()                     # in on_train_batch_end
    loader.rewind(mark, exclude={...})     # in on_train_batch_end, later: the same batches come again

The tape holds references to the host batches since the oldest mark kept, nothing else; without `keep_tape`, nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from stabletrain.errors import UserError
from stabletrain.runtime import rng
from stabletrain.runtime.data.position import LoaderState, check
from stabletrain.runtime.data.tape import Identity, TapedBatch
from stabletrain.runtime.data.taped_loader import LoaderCursor, TapedLoader
from stabletrain.runtime.internals import loader as loader_internals


class DataMark(NamedTuple):
    """A moment between two training steps that the train loader can go back to; see `TrainLoader.mark`."""

    loaders: tuple[TapedLoader, ...]
    places: tuple[LoaderCursor, ...]
    fetched: int
    done: bool
    counted: int
    ahead: int


class TrainLoader:
    """All train loaders of one Trainer during one fit; get it with `TrainLoader.of`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.keeps_tape = False
        self._keeps_position = False
        self._fast_forward = "auto"
        self._users = 0
        self._uninstall: Callable[[], None] | None = None
        self._excluded_events: set[int] = set()
        self._excluded: set[Identity] = set()
        self._counted = 0  # batches after the current one that the fetcher has been told of
        self._owed = 0  # batches left out before the one that is fetched ahead
        self._resume: tuple[list[LoaderState], rng.RngState | None] | None = None
        self._positions: list[LoaderState | None] = []
        self._rng: rng.RngState | None = None
        self._entered = False
        self.started = False

    # ---- life -------------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, trainer: Trainer) -> TrainLoader:
        """The one of this trainer; call it in ``setup`` of a fit, and `close` on ``teardown`` and ``on_exception``."""
        found = getattr(loader_internals.train_loader_wrapper(trainer), "__self__", None)
        if not isinstance(found, TrainLoader):
            found = cls(trainer)
            found._uninstall = loader_internals.process_train_loaders(trainer, found._wrap)
        found._users += 1
        return found

    def close(self) -> None:
        """One user less; the last one's call undoes the installation and lets go of all batches."""
        self._users -= 1
        if self._users == 0 and self._uninstall is not None:
            self._uninstall()
            self._uninstall = None
            self.keeps_tape = False
            for loader in self.loaders:
                loader.tape.forget_before(loader.tape.end)

    def _wrap(self, loader: Any) -> TapedLoader:
        return TapedLoader(loader, self)

    @property
    def loaders(self) -> list[TapedLoader]:
        """The loaders that are read from; empty before the fit loop has asked for them."""
        return [each for each in loader_internals.train_loaders(self.trainer) if isinstance(each, TapedLoader)]

    # ---- going back in time -----------------------------------------------------------------------------------------

    def keep_tape(self) -> None:
        """Remember what is fetched from now on, from the oldest mark that `forget_before` spares."""
        self.keeps_tape = True

    def mark(self) -> DataMark:
        """This moment; call it in ``on_train_batch_end``, between two optimizer steps."""
        fetcher = loader_internals.data_fetcher(self.trainer)
        ahead = len(loader_internals.prefetched(self.trainer))
        loaders = tuple(self.loaders)
        places = tuple(each.cursor_before if ahead else each.cursor for each in loaders)
        return DataMark(loaders, places, fetcher.fetched, fetcher.done, self._counted, ahead)

    def can_rewind(self, mark: DataMark) -> bool:
        """Whether the tape reaches back to the mark; it does not if the loader was replaced since."""
        current = self.loaders
        return len(current) == len(mark.loaders) and all(
            now is then and now.tape.first <= place.event
            for now, then, place in zip(current, mark.loaders, mark.places, strict=True)
        )

    def forget_before(self, mark: DataMark) -> None:
        """Nobody will go back further than to this mark: let go of older batches."""
        for loader, place in zip(mark.loaders, mark.places, strict=True):
            loader.tape.forget_before(place.event)
        if mark.places:
            self._excluded_events = {event for event in self._excluded_events if event >= mark.places[0].event}

    def batches_since(self, mark: DataMark) -> dict[int, TapedBatch]:
        """The batches trained on since the mark, by item id, oldest first; of the first loader, if there are several.

        A batch that is fetched ahead was not trained on, and one that is left out does not count.
        """
        if not mark.loaders:
            return {}
        loader, ahead = mark.loaders[0], loader_internals.prefetched(self.trainer)
        end = (loader.cursor_before if ahead else loader.cursor).event
        events = {number: loader.tape[number] for number in range(mark.places[0].event, end)}
        return {
            number: event
            for number, event in events.items()
            if isinstance(event, TapedBatch)
            and number not in self._excluded_events
            and not {event.identity, event.position_key} & self._excluded
        }

    def rewind(self, mark: DataMark, exclude: AbstractSet[int] = frozenset()) -> None:
        """Go back to the mark: the same batches come again, with the same random numbers drawn by the loader.

        Call it in ``on_train_batch_end``, *after* the loops' progress was put back to what it was at the mark. The
        global generators are as before the call. Batches left out are counted as done, so that batch_idx and the end
        of the epoch are right; from there on the run is what it would be with a loader that never had them (a loader
        that draws from the global generators while it fetches cannot be asked again: its batches stay as they were).

        Args:
            mark: a mark that `can_rewind` accepts.
            exclude: item ids of `batches_since`, the same on all ranks; with gradient accumulation, whole windows.

        Raises:
            UserError: if batches are to be left out and there are several train loaders.
            ValueError: if the tape does not reach back to the mark.
        """
        if not self.can_rewind(mark):
            raise ValueError("the tape does not reach back to this mark: it was forgotten, or the loader was replaced")
        if exclude:
            self._refuse_several()
        self._excluded_events |= exclude
        fetcher = loader_internals.data_fetcher(self.trainer)
        for loader, place in zip(mark.loaders, mark.places, strict=True):
            loader.rewind(place)
        fetcher.fetched, fetcher.done, self._counted, self._owed = mark.fetched, mark.done, mark.counted, 0
        with rng.kept():
            self._look_ahead(fetcher, mark)

    def _look_ahead(self, fetcher: Any, mark: DataMark) -> None:
        ahead = loader_internals.prefetched(self.trainer)
        ahead.clear()
        try:
            while len(ahead) < mark.ahead:
                ahead.append(next(fetcher.iterator))
        except StopIteration:
            fetcher.done = not ahead
        if fetcher.length is not None and self.excludes_any:
            self._count(0, mark.loaders[0].excluded_next(), handed=0)
            fetcher.done = fetcher.fetched >= fetcher.length
        if fetcher.done and not mark.done:
            loader_internals.end_epoch_here(self.trainer)

    # ---- leaving batches out ----------------------------------------------------------------------------------------

    def exclude(self, identities: Iterable[Sequence[Any]]) -> None:
        """Leave out these batches whenever they come, in this process.

        After a restart call it again, in ``setup`` or ``load_state_dict``: a stream is read ahead before training.

        Args:
            identities: of `TapedBatch.identity`, or `TapedBatch.position_key`. All ranks must exclude equally many
                batches at the same positions: where there are several, name batches by their position. A batch named by
                its samples is excluded in every epoch that has just this batch.

        Raises:
            UserError: if there are several train loaders.
        """
        self._refuse_several()
        self._excluded |= {tuple(each) for each in identities}

    @property
    def excluded(self) -> frozenset[Identity]:
        """The identities to be left out."""
        return frozenset(self._excluded)

    @property
    def excludes_any(self) -> bool:
        """Whether anything is to be left out."""
        return bool(self._excluded or self._excluded_events)

    def excludes(self, name: Identity) -> bool:
        """Whether a batch of this identity is to be left out."""
        return name in self._excluded

    def excludes_event(self, number: int) -> bool:
        """Whether this event of the tape is to be left out."""
        return number in self._excluded_events

    def _refuse_several(self) -> None:
        if len(self.loaders) > 1:
            raise UserError(
                f"batches cannot be left out of {len(self.loaders)} train loaders at once: a batch is then several. "
                "Use one train loader, or a rollback that leaves nothing out."
            )

    # ---- what the loaders report ------------------------------------------------------------------------------------

    def on_batch_returned(self, excluded: int, excluded_next: int) -> None:
        """A loader gives a batch: so many were left out before it, and so many will be directly after it."""
        if loader_internals.data_fetcher(self.trainer).length is None:
            self._owed = excluded  # the loop gets this batch later, one is fetched ahead
        else:
            self._count(excluded, excluded_next, handed=1)

    def _count(self, excluded: int, excluded_next: int, handed: int) -> None:
        fetcher = loader_internals.data_fetcher(self.trainer)
        # the fetcher knows by its count which batch is the epoch's last; it will count the one in hand itself
        fetcher.fetched += excluded - self._counted + excluded_next
        self._counted = excluded_next
        if fetcher.fetched + handed >= fetcher.length:
            excluded += excluded_next  # nobody comes after them: this batch is the last, by its number too
        if excluded:
            loader_internals.count_excluded(self.trainer, excluded)

    def on_next(self) -> None:
        """The loop takes the batch that was fetched ahead."""
        if self._owed:
            loader_internals.count_excluded(self.trainer, self._owed)
            self._owed = 0

    def on_iter(self) -> None:
        """An epoch begins; at a restart maybe for the second time, and the first does not count."""
        self._counted = self._owed = 0
        if self._resume is not None:
            self.resume_at(*self._resume)

    # ---- going on from a checkpoint ---------------------------------------------------------------------------------

    def keep_position(self, fast_forward: str) -> None:
        """Be ready for `positions` at any time.

        Args:
            fast_forward: ``"auto"``, ``"indices"`` or ``"batches"``; see `ResumeExactly`.
        """
        self._keeps_position = True
        self._fast_forward = fast_forward

    def passes_over_indices(self, in_process: bool) -> bool:
        """Whether a map-style loader begins at a position without fetching what is before it."""
        return self._fast_forward == "indices" or (self._fast_forward == "auto" and in_process)

    @property
    def notes_rng_before_fetch(self) -> bool:
        """Whether a batch may be fetched ahead of a checkpoint."""
        fetcher = loader_internals.data_fetcher(self.trainer)
        return self._keeps_position and fetcher is not None and fetcher.length is None

    def positions(self) -> list[LoaderState]:
        """Where the run stands in each loader."""
        if self._resume is not None:
            return self._resume[0]
        loaders = self.loaders
        ahead = len(loader_internals.prefetched(self.trainer))
        over, unfinished = (
            loader_internals.epoch_is_over(self.trainer),
            loader_internals.batches_in_progress(self.trainer),
        )
        return [each.position(ahead > 0, over, unfinished) for each in loaders]

    @property
    def run_rng(self) -> rng.RngState:
        """The global generators as training has left them."""
        if self._resume is not None and self._resume[1] is not None:
            return self._resume[1]
        return rng.capture()

    def resume_at(self, positions: list[LoaderState], state: rng.RngState | None) -> None:
        """Go on from here: the next iterator of each loader begins at its position, the run has these generators.

        Args:
            positions: from `positions`, one for each loader.
            state: from `run_rng`; None: leave the generators alone.
        """
        self._resume = positions, state
        self._positions = list(positions)
        self._rng = state

    def check_positions(self) -> None:
        """Compare what the checkpoint says of the loaders with what they are.

        Raises:
            UserError: if their number or, within an epoch, their sizes have changed.
        """
        if self._resume is None:
            return
        positions, loaders = self._resume[0], self.loaders
        if len(positions) != len(loaders):
            raise UserError(
                f"resume_exactly: the checkpoint was made with {len(positions)} train loaders, and there are "
                f"{len(loaders)} now. Use the same train_dataloader, or leave ResumeExactly out "
                "(config key plugins.resume=none)."
            )
        for position, loader in zip(positions, loaders, strict=True):
            check(position, loader.loader)

    def take_position(self, loader: TapedLoader) -> LoaderState | None:
        """The position at which the loader is to begin, once."""
        if self._excluded:
            self._refuse_several()
        if not self._positions:
            return None
        self.check_positions()
        index = self.loaders.index(loader)
        position, self._positions[index] = self._positions[index], None
        return position

    def epoch_starts(self) -> None:
        """Hooks of an epoch's start may draw random numbers: those of the run."""
        if self._resume is not None and self._rng is not None and None not in self._positions:
            rng.restore(self._rng)
            self._resume, self._rng = (self._resume[0], None), None

    def before_rng_use(self) -> None:
        """A loader draws the run's random numbers: what was drawn while the run was being set up is undone."""
        if self._rng is not None and not self._entered:
            rng.restore(self._rng)
            self._entered = True

    def after_fetch(self) -> None:
        """A loader has fetched; if the loop has not started, what follows is not the run yet."""
        self._entered = False
        if self.started:
            self._resume = None
        if self._rng is not None:
            self._rng = None if self.started else rng.capture()
