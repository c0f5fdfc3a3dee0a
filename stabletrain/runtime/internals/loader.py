"""Behind the fit loop's train loader: fetching, counting, validation in between; as `compat`, each with a test."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from torch.utils.data import DataLoader, IterableDataset


def process_train_loaders(trainer: Trainer, wrap: Callable[[Any], Any]) -> Callable[[], None]:
    """Let ``wrap`` have every train loader as Lightning is about to use it; returns the function that undoes this.

    The strategy's hook sees them after a distributed sampler was put in, and validation loaders too.
    """
    strategy = trainer.strategy
    process = strategy.process_dataloader

    def processed(loader: Any) -> Any:
        loader = process(loader)
        return wrap(loader) if trainer.training else loader

    processed.__dict__["wrap"] = wrap
    strategy.process_dataloader = processed  # type: ignore[method-assign,assignment]

    def undo() -> None:
        if strategy.__dict__.get("process_dataloader") is processed:
            del strategy.__dict__["process_dataloader"]

    return undo


def train_loader_wrapper(trainer: Trainer) -> Any:
    """What `process_train_loaders` was called with, or None."""
    return getattr(trainer.strategy.process_dataloader, "wrap", None)


def train_loaders(trainer: Trainer) -> list[Any]:
    """The loaders that the fit loop reads from, as they were processed."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def data_fetcher(trainer: Trainer) -> Any:
    """What reads batches for the fit loop, one ahead where the loader has no length; None outside of a fit."""
    return trainer.fit_loop._data_fetcher


def prefetched(trainer: Trainer) -> list[Any]:
    """Batches that are fetched and not yet handed to the loop (a list that may be changed)."""
    batches: list[Any] = getattr(data_fetcher(trainer), "batches", [])
    return batches


def epoch_number(trainer: Trainer) -> int:
    """The epoch that samplers are told."""
    counts: Any = trainer.fit_loop.epoch_progress.current
    return int(counts.processed)


def batches_in_progress(trainer: Trainer) -> int:
    """1 between fetching a batch and the end of its step, else 0."""
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(counts.ready - counts.processed)


def epoch_is_over(trainer: Trainer) -> bool:
    """Whether the epoch's last batch was trained on, so that the next thing to be fetched is a new epoch."""
    loop = trainer.fit_loop.epoch_loop
    counts: Any = loop.batch_progress.current
    return counts.processed > 0 and counts.ready == counts.processed and loop._num_ready_batches_reached()


def is_within_window(trainer: Trainer) -> bool:
    """Whether gradients of an unfinished accumulation window exist."""
    counts: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return bool(counts.processed) and trainer.fit_loop._should_accumulate()


def count_excluded(trainer: Trainer, batches: int) -> None:
    """Count batches that were left out as done, so that batch_idx and the end of the epoch stay right."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    for counts in (progress.total, progress.current):
        counts.ready += batches
        counts.started += batches
        counts.processed += batches
        counts.completed += batches


def end_epoch_here(trainer: Trainer) -> None:
    """Within ``on_train_batch_end``: this batch has become the epoch's last one."""
    loop = trainer.fit_loop.epoch_loop
    if not loop._num_ready_batches_reached():
        loop.batch_progress.is_last_batch = True
        loop.update_lr_schedulers("epoch", update_plateau_schedulers=False)


def begin_next_epoch(trainer: Trainer) -> None:
    """In ``on_train_start``: after a checkpoint of an epoch's last batch, the next epoch begins as any other.

    Lightning goes on as if within the epoch: it calls no ``on_train_epoch_start``, counts on from the last batch where
    the loader has no length, and with ``max_steps`` trains a single batch, or counts the epoch twice.
    """
    fit_loop = trainer.fit_loop
    loop = fit_loop.epoch_loop
    progress: Any = fit_loop.epoch_progress
    after_batch = loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch
    if not (after_batch or fit_loop.restarted_on_epoch_end):
        return
    if loop.restarted_on_train_batch_end:
        loop.batch_progress.increment_completed()
        loop._batches_that_stepped += 1
    for counts in (progress.total, progress.current):
        counts.processed = counts.completed = counts.ready
    _Loop.restarting.fset(fit_loop, False)  # type: ignore[attr-defined]
    fit_loop.reset_restart_stage()
    loop.reset_restart_stage()


def around_validation(trainer: Trainer, before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Call ``before`` and ``after`` around each validation of a fit; returns the function that undoes this.

    ``on_validation_start`` comes too late: the loader's iterator has drawn a random number by then.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    run = loop.run

    def surrounded() -> Any:
        before()
        try:
            return run()
        finally:
            after()

    loop.run = surrounded  # type: ignore[method-assign]

    def undo() -> None:
        if loop.__dict__.get("run") is surrounded:
            del loop.__dict__["run"]

    return undo


def trust_loader_at_restart(trainer: Trainer) -> Callable[[], None]:
    """Spare the user the warning that a loader without a state of its own cannot go on within an epoch: it will.

    Returns the function that undoes this.
    """
    loop = trainer.fit_loop.epoch_loop
    reset = loop.reset

    def trusting() -> None:
        undo()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
            reset()

    loop.reset = trusting  # type: ignore[method-assign]

    def undo() -> None:
        if loop.__dict__.get("reset") is trusting:
            del loop.__dict__["reset"]

    return undo


def takes_index_sampler(loader: Any) -> bool:
    """Whether the loader is a plain map-style DataLoader that fetches in the order of its sampler."""
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader).__iter__ is DataLoader.__iter__
        and type(loader)._get_iterator is DataLoader._get_iterator
        and getattr(loader, "in_order", True)
    )


def has_kept_workers(loader: Any) -> bool:
    """Whether the loader's next iterator uses the worker processes of an earlier one, and draws no seed for them."""
    return isinstance(loader, DataLoader) and loader.persistent_workers and loader._iterator is not None


def index_sampler(loader: DataLoader[Any]) -> Any:
    """What gives the loader the indices of its next batch (or sample, where batches are not collated)."""
    return loader._index_sampler


def iterate_through(loader: DataLoader[Any], sampler: Any) -> Any:
    """An iterator of the loader that takes its indices from ``sampler``; the loader itself keeps its own."""
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    own = loader.__dict__[name]
    loader.__dict__[name] = sampler  # the public attribute refuses to be set
    try:
        return iter(loader)
    finally:
        loader.__dict__[name] = own
