"""How Lightning's loops continue from a checkpoint, wherever in the loop it was saved; each function with a test."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from stabletrain.runtime.internals.loader import override


class BatchCount(NamedTuple):
    """How many batches were trained on.

    Args:
        epoch: of the current epoch.
        run: since the start of the run.
    """

    epoch: int
    run: int


# ---- which checkpoint a fit goes on from -----------------------------------------------------------------------------


def go_on_from(
    trainer: Trainer, choose: Callable[[], Path | None], after: Callable[[], None] = lambda: None
) -> Callable[[], None]:
    """Let a fit go on from a checkpoint that a plugin chooses, as if the user had given it as ``ckpt_path``.

    A ``ckpt_path`` that the user gave wins: ``choose`` is then not called. When the hooks ``setup`` run, Lightning has
    the user's ``ckpt_path`` in a local variable already, so the choice is made where the restore begins: after
    ``configure_model``, and with strategies that restore after the setup (FSDP2) after ``on_fit_start``.

    Lightning itself goes on from the file that it saved when SLURM requeued the job, also when the plugin has saved
    later than that; of the two the one that was written last is taken.

    Args:
        trainer: of the fit, in a hook ``setup``, on all ranks.
        choose: called on all ranks, once a fit; returns the same on all: a path, or None to start from scratch. Its
            checkpoint is read as data (``weights_only=True``).
        after: called on all ranks when the chosen checkpoint is restored.

    Returns:
        The function that undoes this.
    """
    connector: Any = trainer._checkpoint_connector
    restore, end = connector._restore_modules_and_callbacks, connector.resume_end
    chosen: Path | None = None

    def restored(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        nonlocal chosen
        requeued = _requeued(trainer, checkpoint_path)
        chosen = choose() if not checkpoint_path or requeued else None
        if chosen is not None and requeued and trainer.strategy.broadcast(_is_older(chosen, requeued)):
            chosen = None
        if chosen is None:
            restore(checkpoint_path, weights_only)
        else:
            restore(str(chosen), True)

    def ended() -> None:
        end()
        if chosen is not None and connector._ckpt_path == str(chosen):  # not a finder's, which restores its own file
            after()

    undos = [
        override(connector, "_restore_modules_and_callbacks", restored),
        override(connector, "resume_end", ended),
    ]

    def undo() -> None:
        for each in reversed(undos):
            each()

    return undo


def after_strategy_setup(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` when the strategy has set up model and optimizers, before ``on_fit_start`` and before their state.

    Args:
        trainer: of a fit, in a hook ``setup``.
        call: called on all ranks.

    Returns:
        The function that undoes this.
    """
    strategy = trainer.strategy
    set_up = strategy.setup

    def wrapped(trainer: Trainer) -> None:
        set_up(trainer)
        call()

    return override(strategy, "setup", wrapped)


def is_tuners_fit(trainer: Trainer) -> bool:
    """Whether this fit ends after the trial steps of a ``Tuner``, which calls ``Trainer.fit`` with its finder."""
    return any(getattr(each, "_early_exit", False) for each in trainer.callbacks)  # type: ignore[attr-defined]


def batches_are_over(trainer: Trainer) -> bool:
    """Whether a fit whose checkpoint is restored has nothing left to train: its last step or epoch is done."""
    fit_loop = trainer.fit_loop
    epochs: Any = fit_loop.epoch_progress.current
    limit = fit_loop.max_epochs
    steps_over = 0 <= trainer.max_steps <= trainer.global_step
    return steps_over or (limit is not None and 0 <= limit <= epochs.processed)


def _requeued(trainer: Trainer, checkpoint_path: Any) -> Path | None:
    """The path, if it is that of the file that Lightning saved when SLURM requeued the job, and chose by itself."""
    if not checkpoint_path or "SLURM_NTASKS" not in os.environ:  # as Lightning finds out that it is under SLURM
        return None
    found = trainer._checkpoint_connector._hpc_resume_path
    return Path(found) if found is not None and str(checkpoint_path) == found else None


def _is_older(one: Path, other: Path) -> bool:
    try:
        return one.stat().st_mtime_ns < other.stat().st_mtime_ns
    except OSError:  # one of them is gone, or at a URL
        return False


# ---- where the loop is ----------------------------------------------------------------------------------------------


def before_batch(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` before each training batch is fetched; returns a function that undoes this."""
    loop = trainer.fit_loop.epoch_loop
    advance = loop.advance

    def wrapped(data_fetcher: Any) -> None:
        call()
        advance(data_fetcher)

    return override(loop, "advance", wrapped)


def batch_count(trainer: Trainer) -> BatchCount:
    """The batches that were trained on; a batch in progress is not counted, one that was skipped by ``-1`` is."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return BatchCount(progress.current.processed, progress.total.processed)


def is_in_batch(trainer: Trainer) -> bool:
    """Whether a batch is in progress, from the moment it was fetched until its hooks at the end."""
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(counts.ready > counts.processed)


# ---- setting it back -------------------------------------------------------------------------------------------------


def go_back_to(trainer: Trainer, batches: BatchCount) -> None:
    """Set the counters of a checkpoint that was saved within an optimizer step to the beginning of that step."""
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress
    for counts, number in ((progress.current, batches.epoch), (progress.total, batches.run)):
        counts.ready = counts.started = counts.processed = counts.completed = number
    progress.is_last_batch = False
    optimizer = loop.automatic_optimization.optim_progress.optimizer
    manual = loop.manual_optimization.optim_step_progress
    for tracker in (optimizer.step, optimizer.zero_grad, manual, loop.scheduler_progress):
        for each in (tracker.total, tracker.current):
            each.reset_on_restart()  # ready and started as completed


# ---- loading the dataloaders ----------------------------------------------------------------------------------------


def around_loading(trainer: Trainer, load: Callable[[str, bool, Callable[[], bool]], None]) -> Callable[[], None]:
    """Call ``load`` in place of each loading of dataloaders in a fit; returns a function that undoes this.

    Args:
        trainer: before its fit loop has loaded them.
        load: called with ``"train"`` or ``"val"``, whether they were loaded before, and the function that loads them
            and returns whether there are any.
    """

    def wrapped(name: str, loop: Any) -> Callable[[], None]:
        setup_data = loop.setup_data

        def setup() -> None:
            loaded = loop._combined_loader
            reload = loop._should_reload_train_dl if name == "train" else loop._should_reload_val_dl
            if loaded is not None and not reload:
                setup_data()
                return

            def do() -> bool:
                setup_data()
                return loop._combined_loader is not loaded

            load(name, loaded is not None, do)

        return setup

    loops: dict[str, Any] = {"train": trainer.fit_loop, "val": trainer.fit_loop.epoch_loop.val_loop}
    undos = [override(loop, "setup_data", wrapped(name, loop)) for name, loop in loops.items()]

    def undo() -> None:
        for each in undos:
            each()

    return undo


def load_train_again(trainer: Trainer) -> None:
    """Let the fit loop load the train dataloaders when it starts, also if they are loaded already."""
    trainer.fit_loop._combined_loader = None


@contextlib.contextmanager
def at_epoch(trainer: Trainer, epoch: int) -> Iterator[None]:
    """``trainer.current_epoch`` is this epoch."""
    counts: Any = trainer.fit_loop.epoch_progress.current
    now = counts.completed
    counts.completed = epoch
    try:
        yield
    finally:
        counts.completed = now


# ---- restoring a checkpoint that the same fit has saved -------------------------------------------------------------


def around_own_restore(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Call ``before`` and ``after`` around each restore within a fit, as at the end of `LearningRateFinder`.

    ``Trainer.fit(ckpt_path=...)`` does not come here. If it is in progress, it then goes on: Lightning forgets its
    checkpoint after a restore in ``on_fit_start``, and would not restore the optimizer and the loops.

    Returns a function that undoes this.
    """
    connector = trainer._checkpoint_connector
    restore = connector.restore

    def wrapped(*args: Any, **kwargs: Any) -> None:
        resumed, path = connector._loaded_checkpoint, connector._ckpt_path
        before()
        try:
            restore(*args, **kwargs)
        finally:
            if resumed:
                connector._loaded_checkpoint, connector._ckpt_path = resumed, path
            after()

    return override(connector, "restore", wrapped)
