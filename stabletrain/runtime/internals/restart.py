"""Lightning's loops go on where a checkpoint was saved, with what was due after it: see `Restart`.

On resume Lightning itself omits what followed the save: a validation that was due, the step of a plateau scheduler, the
hooks of the epoch's end, the values for the loggers.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from stabletrain.runtime.internals import state as state_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.internals.loader import override
from stabletrain.runtime.internals.resuming import BatchCount, go_back_to


class Place(enum.Enum):
    """Where in the loops a checkpoint was saved."""

    ELSEWHERE = enum.auto()
    """Between two epochs, before the first batch of one, or after a run that ended within an epoch."""
    IN_STEP = enum.auto()
    """Within an optimizer step, before its update, in a checkpoint that holds the state at the step's beginning."""
    BATCH_END = enum.auto()
    """In ``on_train_batch_end``."""
    IN_VALIDATION = enum.auto()
    """In a validation that was not complete."""
    AFTER_VALIDATION = enum.auto()
    """In ``on_validation_end``."""
    EPOCH_END = enum.auto()
    """In ``on_train_epoch_end``."""


_WITHIN_EPOCH = (Place.IN_STEP, Place.BATCH_END, Place.IN_VALIDATION, Place.AFTER_VALIDATION)


def place_of(trainer: Trainer) -> Place:
    """Where the loops are now; in a fit that resumes and has not started yet, where its checkpoint was saved."""
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    epochs: Any = fit_loop.epoch_progress.current
    batches: Any = loop.batch_progress.current
    if batches.ready != batches.processed or not batches.processed or epochs.ready != epochs.started:
        return Place.ELSEWHERE
    if epochs.processed == epochs.started and epochs.completed == epochs.processed - 1:
        return Place.EPOCH_END if loop._num_ready_batches_reached() else Place.ELSEWHERE
    if epochs.processed != epochs.started - 1:
        return Place.ELSEWHERE
    if batches.completed == batches.processed - 1:
        return Place.BATCH_END
    if batches.completed != batches.processed:
        return Place.ELSEWHERE
    return Place.AFTER_VALIDATION if validation_is_complete(trainer) else Place.IN_VALIDATION


def is_within_epoch(trainer: Trainer) -> bool:
    """Whether a run that resumes from a checkpoint of now goes on in this epoch, or ends it with all its hooks."""
    return place_of(trainer) in _WITHIN_EPOCH


def validation_is_complete(trainer: Trainer) -> bool:
    """Whether the last batch of the validation that runs now, or ran last, has been validated."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    return progress.is_last_batch and progress.current.completed == progress.current.ready > 0


def complete_counts(trainer: Trainer) -> None:
    """Count the batch at which ``on_train_batch_start`` returned -1 in full: it was not started nor completed.

    Otherwise the totals of later checkpoints differ from those of a run without such a batch, and Lightning finds out
    by these differences where in the loop a checkpoint was saved.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    current, total = progress.current, progress.total
    if current.started < current.ready == current.processed:
        current.started = current.completed = current.ready
    for name in ("started", "processed", "completed"):
        setattr(total, name, total.ready - current.ready + getattr(current, name))


class Restart:
    """A resumed fit first does what the saving run did after the checkpoint, then trains on the next batch.

    After a save in ``on_train_batch_end`` that is: values for the loggers, the validation if it was due, schedulers of
    the kind ReduceLROnPlateau, and at the epoch's end its hooks. A validation that was not complete is run again from
    its first batch. After a save in ``on_train_epoch_end``: the plateau schedulers and the epoch's values. After a save
    within a step the whole step is made again.

    Args:
        trainer: before its fit starts.
        restore: called once all ``on_train_start`` hooks have run, at the epoch that the checkpoint was saved in. Its
            argument: whether the run goes on within that epoch.
        must_stop: whether ``trainer.should_stop`` was set when the checkpoint was saved.
    """

    def __init__(self, trainer: Trainer, restore: Callable[[bool], None], must_stop: Callable[[], bool]) -> None:
        self._trainer, self._restore, self._must_stop = trainer, restore, must_stop
        self._active, self._unfinished = False, None  # type: bool, BatchCount | None
        self._place = Place.ELSEWHERE
        fit_loop = trainer.fit_loop
        self._limits: tuple[int, int] | None = None
        self._loop_setup, self._loop_reset, self._loop_start = (
            fit_loop.setup_data,
            fit_loop.reset,
            fit_loop.on_run_start,
        )
        ours = {"setup_data": self._setup, "reset": self._reset, "on_run_start": self._start}
        self._undo = [override(fit_loop, name, method) for name, method in ours.items()]

    def activate(self, unfinished: BatchCount | None = None) -> None:
        """A checkpoint was loaded that ``restore`` can restore; without this Lightning resumes as it does.

        Args:
            unfinished: the batches before the step within which it was saved; None: it was saved between two steps.
        """
        self._active, self._unfinished = True, unfinished

    @staticmethod
    def of(trainer: Trainer) -> Restart | None:
        """The one that is installed in a trainer, or None."""
        found = getattr(vars(trainer.fit_loop).get("reset"), "__self__", None)
        return found if isinstance(found, Restart) else None

    def remove(self) -> None:
        """Restore the loops' own methods."""
        self._end_reopening()
        while self._undo:
            self._undo.pop()()

    def _setup(self) -> None:
        """In place of ``setup_data`` of the fit loop, after which the loop asks whether its limits are reached."""
        self._end_reopening()
        self._loop_setup()
        if self._is_starting and self._trainer.fit_loop._loaded_from_state_dict:
            self._find_place()
            self._reopen()

    @property
    def _is_starting(self) -> bool:
        return self._active and not trainer_internals.is_trial(self._trainer)

    def _find_place(self) -> None:
        """From the counters of the checkpoint, which were loaded, and which nothing has read yet."""
        complete_counts(self._trainer)
        if self._unfinished is None:
            self._place = place_of(self._trainer)
        else:
            go_back_to(self._trainer, self._unfinished)
            self._place = Place.IN_STEP

    def _reopen(self) -> None:
        """Let the fit loop start, although the last epoch or step of the run was done: what followed it was not."""
        fit_loop = self._trainer.fit_loop
        loop, epochs = fit_loop.epoch_loop, self._trainer.fit_loop.epoch_progress.current
        if self._place is Place.ELSEWHERE or self._limits is not None:
            return
        self._limits = loop.max_steps, epochs.processed  # type: ignore[attr-defined]
        if 0 <= loop.max_steps <= loop.global_step:
            loop.max_steps = loop.global_step + 1
        if self._place is Place.EPOCH_END:
            epochs.processed -= 1  # type: ignore[attr-defined]

    def _end_reopening(self) -> None:
        if self._limits is not None:
            fit_loop = self._trainer.fit_loop
            epochs: Any = fit_loop.epoch_progress.current
            fit_loop.epoch_loop.max_steps, epochs.processed = self._limits
            self._limits = None

    def _reset(self) -> None:
        """In place of ``reset`` of the fit loop, which guesses what was done already, and counts it as done."""
        fit_loop = self._trainer.fit_loop
        self._end_reopening()
        saved = state_internals.progress(self._trainer)
        self._loop_reset()
        if not self._is_starting or self._place not in _WITHIN_EPOCH:
            return
        state_internals.set_progress(self._trainer, saved)
        loop = fit_loop.epoch_loop
        if self._place is Place.BATCH_END:
            loop.batch_progress.increment_completed()
        fit_loop._restart_stage, loop._restart_stage = "restarted_mid_epoch", "restarted_on_last"
        loop.val_loop._restart_stage, loop.val_loop._restarting = "none", False
        if self._place is Place.IN_VALIDATION:
            self._forget_validation()
        first = self._repeat_step if self._place is Place.IN_STEP else self._finish_batch
        self._undo.append(override(loop, "advance", first))

    def _forget_validation(self) -> None:
        """The total is that of the validations of this epoch."""
        progress: Any = self._trainer.fit_loop.epoch_loop.val_loop.batch_progress
        for name in vars(progress.current):
            setattr(progress.total, name, getattr(progress.total, name) - getattr(progress.current, name))
        progress.reset_on_run()

    def _start(self) -> None:
        """In place of ``on_run_start`` of the fit loop: calls it, then restores, or ends the epoch."""
        self._loop_start()
        if not self._is_starting:
            return
        self._active = False
        trainer = self._trainer
        if self._place is Place.EPOCH_END:
            self._finish_epoch()
        else:
            self._restore(self._place in _WITHIN_EPOCH)
        if self._place in _WITHIN_EPOCH:
            # otherwise Lightning would not step the plateau schedulers at the end of the epoch
            trainer.fit_loop._restarting = False
            self._reopen()
        elif self._must_stop():
            trainer.should_stop = True

    def _finish_batch(self, data_fetcher: Any) -> None:
        """In place of the epoch loop's first ``advance``: the batch was trained on, and ``on_advance_end`` follows."""
        loop, connector = self._trainer.fit_loop.epoch_loop, self._trainer._logger_connector
        self._undo.pop()()
        connector._first_loop_iter = False  # or the first value that is logged would reset the epoch's averages
        if self._place is Place.BATCH_END:
            connector.on_batch_end()
            connector.update_train_step_metrics()
        loop._skip_next_val = self._place is Place.AFTER_VALIDATION
        if self._must_stop():
            self._trainer.should_stop = True

    def _repeat_step(self, data_fetcher: Any) -> None:
        """In place of the epoch loop's first ``advance``: calls it, without what it does in a loop that restarts."""
        loop = self._trainer.fit_loop.epoch_loop
        self._undo.pop()()
        if loop.batch_progress.current.ready:
            self._trainer._logger_connector._first_loop_iter = False
        loop._restarting = False
        loop.advance(data_fetcher)

    def _finish_epoch(self) -> None:
        """The rest of the fit loop's ``on_advance_end``, in which the checkpoint was saved."""
        trainer, fit_loop = self._trainer, self._trainer.fit_loop
        loop, connector = fit_loop.epoch_loop, trainer._logger_connector
        epochs: Any = fit_loop.epoch_progress.current
        epochs.completed = epochs.processed - 1  # the number of the epoch, for schedulers and loggers
        self._restore(False)
        connector.epoch_end_reached()
        connector.on_epoch_end()
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
        loop._batches_that_stepped -= 1  # the step of the values is that of the last batch
        connector.update_train_epoch_metrics()
        loop._batches_that_stepped += 1
        epochs.completed = epochs.processed
