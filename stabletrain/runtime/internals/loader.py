"""Private attributes of Lightning's fit loop and torch's DataLoader that the train loader needs, each with a test."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from stabletrain.runtime.internals.packages import own


def wrap_train_loaders(
    trainer: Trainer, wrap: Callable[[Any], Any], is_active: Callable[[], bool] = lambda: True
) -> Callable[[], None]:
    """Replace every train loader by ``wrap(loader)`` when Lightning sets it up; returns a function that undoes this.

    It patches the strategy's ``process_dataloader``, which Lightning calls after it has added a distributed sampler,
    and also for validation loaders; these are not wrapped.

    Args:
        trainer: before its fit loop has loaded them.
        wrap: returns what the loop reads from.
        is_active: whether to wrap those that are loaded now.
    """
    strategy, loop = trainer.strategy, trainer.fit_loop
    process, setup_data = strategy.process_dataloader, loop.setup_data
    loads_train = False  # `trainer.training` does not tell: BatchSizeFinder then loads validation loaders, too

    def processed(loader: Any) -> Any:
        loader = process(loader)
        return wrap(loader) if loads_train and is_active() else loader

    def setup_train_data() -> None:
        nonlocal loads_train
        loads_train = True
        try:
            setup_data()
        finally:
            loads_train = False

    processed.__dict__["wrap"] = wrap
    undo_setup = override(loop, "setup_data", setup_train_data)
    undo_process = override(strategy, "process_dataloader", processed)

    def undo() -> None:
        undo_process()
        undo_setup()

    return undo


def train_loader_wrapper(trainer: Trainer) -> Any:
    """The ``wrap`` of the last `wrap_train_loaders` that was not undone, or None."""
    return getattr(trainer.strategy.process_dataloader, "wrap", None)


def train_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that the fit loop reads from, as wrapped; empty before the fit loop has set them up."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def combined_train_loader(trainer: Trainer) -> Any:
    """Lightning's ``CombinedLoader`` of the train loaders, a new one when it reloads them; None before."""
    return trainer.fit_loop._combined_loader


def combined_validation_loader(trainer: Trainer) -> Any:
    """The same of the validation loaders of a fit."""
    return trainer.fit_loop.epoch_loop.val_loop._combined_loader


def data_fetcher(trainer: Trainer) -> Any:
    """Lightning's fetcher, which prefetches one batch if the loader has no length; None before the fit loop runs."""
    return trainer.fit_loop._data_fetcher


def prefetched(trainer: Trainer) -> list[Any]:
    """Batches that were fetched and that the loop has not taken yet: the fetcher's own list, which may be changed."""
    return prefetched_by(data_fetcher(trainer))


def prefetched_by(fetcher: Any) -> list[Any]:
    """The same of a fetcher."""
    batches: list[Any] = getattr(fetcher, "batches", [])
    return batches


def around_fetching(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Call two functions before and after each training batch is fetched; returns a function that undoes this.

    Lightning's profiler is told at the same places, by two methods of the loop that it reads when an epoch begins.

    Args:
        trainer: before an epoch begins.
        before: called before a batch is fetched.
        after: called when it is there, or when there is none.
    """
    loop = trainer.fit_loop.epoch_loop
    begin, end = loop._on_before_fetch, loop._on_after_fetch

    def fetching() -> None:
        begin()
        before()

    def fetched() -> None:
        after()
        end()

    undo_before = override(loop, "_on_before_fetch", fetching)
    undo_after = override(loop, "_on_after_fetch", fetched)

    def undo() -> None:
        undo_after()
        undo_before()

    return undo


def all_ranks_read_alike(trainer: Trainer) -> bool:
    """Whether the strategy gives all of several ranks the same batches, as tensor parallelism does.

    Args:
        trainer: in a fit.
    """
    dealt: dict[str, int] | None = trainer.distributed_sampler_kwargs if trainer.world_size > 1 else None
    return dealt is not None and dealt.get("num_replicas") == 1


def epoch_number(trainer: Trainer) -> int:
    """The current epoch from 0, as passed to ``set_epoch`` of samplers."""
    counts: Any = trainer.fit_loop.epoch_progress.current
    return int(counts.processed)


def epoch_is_over(trainer: Trainer) -> bool:
    """Whether the epoch's last batch was trained on, so that the next fetch starts a new epoch."""
    loop = trainer.fit_loop.epoch_loop
    counts: Any = loop.batch_progress.current
    return counts.processed > 0 and counts.ready == counts.processed and loop._num_ready_batches_reached()


def count_excluded(trainer: Trainer, batches: int) -> None:
    """Count excluded batches as completed: Lightning takes batch_idx and the end of an epoch from these counts."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    for counts in (progress.total, progress.current):
        counts.ready += batches
        counts.started += batches
        counts.processed += batches
        counts.completed += batches


def end_epoch_here(trainer: Trainer) -> None:
    """Make the current batch, which was not the epoch's last, the last one; call it in ``on_train_batch_end``.

    Lightning steps the per-epoch schedulers of an epoch's last batch before that hook, so this steps them instead.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.batch_progress.is_last_batch = True
    loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)


def begin_next_epoch(trainer: Trainer) -> bool:
    """Start an epoch as an uninterrupted run does, if the checkpoint was saved between two epochs.

    Call it in ``on_train_start``. A checkpoint saved at or after the epoch's last batch still belongs to that epoch
    until its end was counted.

    Returns:
        Whether an epoch starts.

    Otherwise Lightning would continue within the old epoch: it calls no ``on_train_epoch_start``, continues the old
    batch count if the loader has no length, and with ``max_steps`` trains on a single batch or counts the epoch twice.
    It also would not call ``iter()`` again, and use a batch that was prefetched before ``on_train_epoch_start``.
    """
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    progress: Any = fit_loop.epoch_progress
    before_first_batch = fit_loop.restarted_on_epoch_start and loop.batch_idx < 0
    if fit_loop.restarted_mid_epoch or not (epoch_is_over(trainer) or before_first_batch):
        return False
    for counts in (progress.total, progress.current):
        counts.ready = counts.processed = counts.completed = counts.started
    own(_Loop, fit_loop).restarting.fset(fit_loop, False)  # type: ignore[attr-defined]
    fit_loop._resuming_from_checkpoint = False
    fit_loop.reset_restart_stage()
    loop.reset_restart_stage()
    return True


def after_train_start(trainer: Trainer, call: Callable[[], None]) -> Callable[[], None]:
    """Call ``call`` once the ``on_train_start`` hooks of all callbacks and the module have run.

    Returns a function that undoes this. The ``on_train_start`` of one callback is too early: others may run after it.
    """
    loop = trainer.fit_loop
    on_run_start = loop.on_run_start

    def wrapped() -> None:
        on_run_start()
        call()

    return override(loop, "on_run_start", wrapped)


def around_validation(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Call ``before`` and ``after`` around each validation of a fit; returns a function that undoes this.

    ``on_validation_start`` is too late: by then the validation loader's iterator has drawn a random number.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = loop.run

    def wrapped() -> Any:
        before()
        try:
            return run()
        finally:
            after()

    return override(loop, "run", wrapped)


def silence_resume_warning(trainer: Trainer) -> Callable[[], None]:
    """Silence Lightning's warning that the train loader cannot resume within an epoch, once.

    Returns a function that undoes this.
    """
    loop = trainer.fit_loop.epoch_loop
    reset = loop.reset

    def silenced() -> None:
        undo()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            reset()

    undo = override(loop, "reset", silenced)
    return undo


def takes_index_sampler(loader: Any) -> bool:
    """Whether the loader is a map-style DataLoader that fetches in its sampler's order, with torch's own iterator."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and _makes_torch_iterators(loader)
        and getattr(loader, "in_order", True)
    )


def reuses_workers(loader: Any) -> bool:
    """Whether the loader's next iterator reuses (persistent) worker processes, and so draws no new seed for them."""
    return isinstance(loader, DataLoader) and loader.persistent_workers and loader._iterator is not None


def index_sampler(loader: DataLoader[Any]) -> Any:
    """The loader's batch sampler, or its sampler if it does not collate batches."""
    return loader._index_sampler


def iterate_with(loader: DataLoader[Any], sampler: Any) -> Any:
    """Return an iterator of the loader that takes its indices from ``sampler``; the loader is not changed."""
    if reuses_workers(loader):  # of an iterator that took the sampler of the loader, or an earlier one of ours
        loader._iterator._index_sampler = sampler  # type: ignore[union-attr]
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    own = loader.__dict__[name]
    loader.__dict__[name] = sampler  # DataLoader forbids to set the attribute after __init__
    try:
        return iter(loader)
    finally:
        loader.__dict__[name] = own


def stop_workers(loader: Any, iterator: Any) -> None:
    """End the worker processes of an iterator that nothing is fetched from any more; call it before it is dropped.

    An iterator that is part of a reference cycle is freed by Python's garbage collector, which ends the threads that
    feed the workers' queues before it asks the iterator to stop: the workers never hear of it, and torch waits five
    seconds for each. Persistent workers are the loader's, and iterators of classes with an ``__iter__`` of their own
    may be in use elsewhere: both stay as they are.

    Args:
        loader: whose ``iter()`` returned the iterator.
        iterator: of any kind, also None.
    """
    is_ours = isinstance(iterator, _MultiProcessingDataLoaderIter) and _makes_torch_iterators(loader)
    if is_ours and not loader.persistent_workers:
        iterator._shutdown_workers()


def _makes_torch_iterators(loader: Any) -> bool:
    return type(loader).__iter__ is DataLoader.__iter__ and type(loader)._get_iterator is DataLoader._get_iterator


def override(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Set a method on an instance; returns a function that restores what was there before."""
    before = owner.__dict__.get(name)
    setattr(owner, name, method)

    def undo() -> None:
        if owner.__dict__.get(name) is method:
            del owner.__dict__[name]
            if before is not None:
                setattr(owner, name, before)

    return undo
