"""The train loaders of a Trainer: resumed at any batch, and rewound to an earlier batch of a running fit.

    loader = TrainLoader.of(trainer)         # in setup(); close() when done
    loader.keep_tape()                       # from now on, fetched batches are stored
    mark = loader.mark()                     # in on_train_batch_end
    loader.rewind(mark, exclude={...})       # in on_train_batch_end, later: the same batches come again

The tape holds references to the host batches since the oldest mark in use, up to the limit of `limit_tape`; without
`keep_tape` it holds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from stabletrain.runtime import rng
from stabletrain.runtime.data.exclusions import Exclusions
from stabletrain.runtime.data.fetch_counter import FetchCounter, FetcherState
from stabletrain.runtime.data.global_order import UNKNOWN_ORDER
from stabletrain.runtime.data.position import LoaderState
from stabletrain.runtime.data.resume_point import ResumePoint
from stabletrain.runtime.data.tape import Identity, TapedBatch
from stabletrain.runtime.data.tape_limit import TapeLimit
from stabletrain.runtime.data.taped_loader import LoaderCursor, LoaderPlace, TapedLoader
from stabletrain.runtime.internals import loader as loader_internals
from stabletrain.runtime.internals import trainer as trainer_internals


class DataMark(NamedTuple):
    """A position between two training steps that the train loaders can be rewound to; see `TrainLoader.mark`."""

    loaders: tuple[TapedLoader, ...]
    cursors: tuple[LoaderCursor, ...]
    fetcher: FetcherState


class Places(NamedTuple):
    """Where the loop is in all train loaders; see `TrainLoader.places`."""

    of_loaders: list[LoaderPlace]
    prefetched: bool


class TrainLoader:
    """All train loaders of one Trainer during one fit; get it with `TrainLoader.of`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._users = 0
        self._uninstall: Callable[[], None] | None = None
        self._keeps_tape = False
        self._on_other_content: Callable[[], None] | None = None
        self.rewinds = 0
        """How often it was rewound."""
        self._exclusions = Exclusions(trainer)
        self._resume = ResumePoint(trainer)
        self._counter = FetchCounter(trainer)
        self._limit = TapeLimit(lambda: [each.tape for each in self.loaders])

    # ---- setup and teardown -----------------------------------------------------------------------------------------

    @classmethod
    def of(cls, trainer: Trainer) -> TrainLoader:
        """The train loader of this trainer, shared by all callers.

        Call it in ``setup`` of a fit, and `close` in ``teardown`` and ``on_exception``.
        """
        found = cls.find(trainer)
        if found is None:
            found = cls(trainer)
            found._uninstall = loader_internals.wrap_train_loaders(
                trainer, found._wrap, lambda: not trainer_internals.is_trial(trainer)
            )
        found._users += 1
        return found

    @classmethod
    def find(cls, trainer: Trainer) -> TrainLoader | None:
        """The train loader of this trainer if a caller of `of` uses it, else None."""
        found = getattr(loader_internals.train_loader_wrapper(trainer), "__self__", None)
        return found if isinstance(found, TrainLoader) else None

    def close(self) -> None:
        """Release it for one caller of `of`; the last call restores the strategy and drops all stored batches."""
        self._users -= 1
        if self._users == 0 and self._uninstall is not None:
            self._uninstall()
            self._uninstall = None
            self._set_tape(False)
            for loader in self.loaders:
                loader.tape.forget_before(loader.tape.end)
                loader.close()

    @property
    def loaders(self) -> list[TapedLoader]:
        """The loaders that the fit loop reads from; empty before it has set them up."""
        return [each for each in loader_internals.train_loaders(self.trainer) if isinstance(each, TapedLoader)]

    def _wrap(self, loader: Any) -> TapedLoader:
        for replaced in self.loaders:  # Lightning reloads them; marks may still hold the old ones
            replaced.close()
        wrapped = TapedLoader(loader, self.trainer, self._exclusions, self._resume, self._counter, self._limit)
        wrapped.tape.enabled, wrapped.on_other_content = self._keeps_tape, self._on_other_content
        return wrapped

    def _set_tape(self, enabled: bool) -> None:
        self._keeps_tape = enabled
        for loader in self.loaders:
            loader.tape.enabled, loader.on_other_content = enabled, self._on_other_content

    # ---- rewinding --------------------------------------------------------------------------------------------------

    def keep_tape(self, on_other_content: Callable[[], None] | None = None) -> None:
        """Store all batches that are fetched from now on, until `forget_before` or `limit_tape` drops them.

        Args:
            on_other_content: store only the sample indices of a batch if it can be fetched again as it was: by this
                process, from a map-style dataset, without a draw from a global generator. Called, once, if a batch has
                other content then. None: store the batches themselves.
        """
        self._on_other_content = None if on_other_content is None else _once(on_other_content)
        self._set_tape(True)

    @property
    def fetches_again(self) -> bool:
        """Whether only sample indices are stored of the batches of all loaders, see `keep_tape`."""
        return self._on_other_content is not None and all(each.can_fetch_again for each in self.loaders)

    def limit_tape(self, batches: float, nbytes: float, on_bytes_exceeded: Callable[[], None] | None = None) -> None:
        """From now on, drop the oldest stored batches beyond a number and a size; earlier marks are then out of reach.

        Args:
            batches: of each train loader, >= 1.
            nbytes: of all train loaders together, bytes.
            on_bytes_exceeded: called when batches are dropped because of their size, once.
        """
        self._limit.set(batches, nbytes, on_bytes_exceeded)

    def mark(self) -> DataMark:
        """Mark the current position; call it in ``on_train_batch_end``, between two optimizer steps."""
        fetcher, loaders = self._counter.state(), tuple(self.loaders)
        return DataMark(loaders, tuple(_cursor(each, fetcher.prefetched) for each in loaders), fetcher)

    def can_rewind(self, mark: DataMark) -> bool:
        """Whether the tape reaches back to the mark.

        It does not if Lightning has reloaded the train loader since, or beyond the limit of `limit_tape`.
        """
        loaders = self.loaders
        return len(loaders) == len(mark.loaders) and all(
            loader is marked and loader.tape.first <= cursor.event
            for loader, marked, cursor in zip(loaders, mark.loaders, mark.cursors, strict=True)
        )

    def forget_before(self, mark: DataMark) -> None:
        """Drop the batches before this mark; earlier marks can no longer be rewound to."""
        for loader, cursor in zip(mark.loaders, mark.cursors, strict=True):
            loader.tape.forget_before(cursor.event)
        if mark.cursors:
            self._exclusions.forget_events_before(mark.cursors[0].event)

    def batches_since(self, mark: DataMark) -> dict[int, TapedBatch]:
        """The batches trained on since the mark, by their numbers on the tape, oldest first.

        If there are several loaders, those of the first.

        Prefetched and excluded batches are omitted, and those that the tape no longer stores.
        """
        if not mark.loaders:
            return {}
        loader = mark.loaders[0]
        end = _cursor(loader, len(loader_internals.prefetched(self.trainer))).event
        start = max(mark.cursors[0].event, loader.tape.first)
        events = {number: loader.tape[number] for number in range(start, end)}
        return {
            number: event
            for number, event in events.items()
            if isinstance(event, TapedBatch) and not self._exclusions.cover(number, event)
        }

    def rewind(self, mark: DataMark, exclude: AbstractSet[int] = frozenset()) -> None:
        """Rewind to the mark: the same batches come again, and the loader draws the same random numbers for them.

        Call it in ``on_train_batch_end``, *after* the progress of the loops was restored to that of the mark. The
        global generators are as before the call. Excluded batches are counted as completed, so that batch_idx and the
        end of the epoch are right; the run continues as with a loader that never had them. (If fetching draws from the
        global generators in the training process, the stored batches are not fetched again and keep their content.)

        Args:
            mark: a mark that `can_rewind` accepts.
            exclude: numbers of `batches_since`, the same on all ranks; with gradient accumulation, whole windows.

        Raises:
            UserError: if batches are excluded and there are several train loaders.
            ValueError: if the tape does not reach back to the mark.
        """
        if not self.can_rewind(mark):
            raise ValueError("the tape does not reach back to this mark: it was dropped, or the loader was reloaded")
        if exclude:
            self._exclusions.require_one_loader()
        self._exclusions.add_events(exclude)
        self.rewinds += 1
        for loader, cursor in zip(mark.loaders, mark.cursors, strict=True):
            loader.rewind(cursor)
        with rng.preserved():
            self._counter.rewind(mark.fetcher, mark.loaders[0].excluded_next if self._exclusions else None)

    @property
    def current_samples(self) -> Any:
        """The indices of the batch that is trained on now, as returned by the sampler; see `sample_names`.

        None if they are unknown: the data have no sampler, or there are several train loaders.
        """
        loaders = self.loaders
        if len(loaders) != 1:
            return None
        if loader_internals.prefetched(self.trainer):
            return loaders[0].samples_before
        return None if loaders[0].last_batch is None else loaders[0].last_batch.samples

    # ---- excluding batches ------------------------------------------------------------------------------------------

    def exclude(self, identities: Iterable[Sequence[Any]]) -> None:
        """Exclude these batches whenever they come, in this process.

        After a restart call it again, in ``setup`` or ``load_state_dict``: a loader without a length is read before
        training starts.

        Args:
            identities: of `TapedBatch.identity`, or `TapedBatch.position_key`. All ranks must exclude equally many
                batches at the same positions: with several ranks, name batches by their position. A batch named by its
                samples is excluded in every epoch that has a batch of exactly these samples.

        Raises:
            UserError: if there are several train loaders.
        """
        self._exclusions.require_one_loader()
        self._exclusions.add(identities)

    def include(self, identities: Iterable[Sequence[Any]]) -> None:
        """Undo `exclude`: these batches are trained on when they come again."""
        self._exclusions.remove(identities)

    @property
    def excluded(self) -> frozenset[Identity]:
        """The identities of `exclude`, without those of `include`."""
        return self._exclusions.identities

    # ---- resuming from a checkpoint ---------------------------------------------------------------------------------

    def record_positions(self, fast_forward: str, name: str, opt_out: str) -> None:
        """Record what `positions` needs, from now on.

        Args:
            fast_forward: how a map-style loader reaches its position: ``"indices"`` (skip the batches before it),
                ``"batches"`` (fetch them), ``"auto"`` (skip if it fetches in this process, else fetch).
            name: of the plugin, to start messages with.
            opt_out: how to run without it, to end error messages with, after "or": ``"remove ... (config key ...)"``.
        """
        self._resume.enable(fast_forward, name, opt_out)

    def places(self) -> Places:
        """Where the loop is now, between two batches of an epoch: for `positions`, later; takes 2 microseconds."""
        return Places([each.place for each in self.loaders], len(loader_internals.prefetched(self.trainer)) > 0)

    def positions(self, places: Places | None = None) -> list[LoaderState]:
        """The run's position in each loader.

        Args:
            places: where the run is; None: where the loop is now.
        """
        if self._resume.positions is not None:
            return self._resume.positions
        epoch_over = places is None and loader_internals.epoch_is_over(self.trainer)
        of_loaders, prefetched = places or self.places()
        pairs = zip(self.loaders, of_loaders, strict=True)
        return [loader.position(place, prefetched, epoch_over) for loader, place in pairs]

    @property
    def is_resuming(self) -> bool:
        """Whether a checkpoint was loaded from which training has not fetched a batch yet."""
        return self._resume.positions is not None

    @property
    def has_started(self) -> bool:
        """Whether the training loop has started."""
        return self._resume.has_started

    @property
    def run_rng(self) -> rng.RngState:
        """The global generators of the run: those of the checkpoint until the training loop starts."""
        state = self._resume.run_rng
        return state if state is not None else rng.capture()

    def resume_at(self, positions: list[LoaderState], state: rng.RngState | None) -> None:
        """Resume: the next iterator of each loader starts at its position, and training with these generators.

        Args:
            positions: from `positions`, one for each loader.
            state: from `run_rng`; None: do not change the generators.
        """
        self._resume.set(positions, state)

    def warn_of_unknown_order(self, positions: list[LoaderState]) -> None:
        """Warn if another number of processes cannot end the epochs in progress, since their order is not known.

        Args:
            positions: of a checkpoint.
        """
        if any(each.batches and each.start.order is None for each in positions):
            self._resume.warn_of_other_samples(UNKNOWN_ORDER)

    def check_positions(self) -> None:
        """Compare the checkpoint's positions with the loaders; no effect if no checkpoint was loaded.

        Raises:
            UserError: if the number of loaders has changed or, within an epoch, their sizes.
        """
        self._resume.check()

    def on_loop_start(self) -> None:
        """Call it after all ``on_train_start`` hooks: from here on the run's random numbers are drawn."""
        self._resume.on_loop_start()


def _cursor(loader: TapedLoader, prefetched: int) -> LoaderCursor:
    return loader.cursor_before if prefetched else loader.cursor


def _once(call: Callable[[], None]) -> Callable[[], None]:
    calls = [call]
    return lambda: calls.pop()() if calls else None
