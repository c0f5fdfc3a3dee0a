"""Every private attribute of Lightning and torch that stabletrain touches, each with a test in tests/runtime.

Nothing else in the project may reach behind a public interface; when a new version moves one of these, one function
and one test break, and say so.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
"""The callback hooks that Lightning calls at every step."""


def silence_step_hooks(callback: Callback, among: type[Callback]) -> None:
    """Spare a callback the per-step hooks that it inherits without using them (about 1.4 microseconds each).

    Lightning calls a hook only if the attribute is callable, so on the instance an inherited one becomes None.

    Args:
        callback: the callback.
        among: the base class whose own hooks are not needed on this instance.
    """
    for hook in STEP_HOOKS:
        if getattr(type(callback), hook) in (getattr(Callback, hook), getattr(among, hook)):
            callback.__dict__[hook] = None


def restore_step_hooks(callback: Callback) -> None:
    """Undo `silence_step_hooks`."""
    for hook in STEP_HOOKS:
        if callback.__dict__.get(hook, callback) is None:
            del callback.__dict__[hook]


def hold_global_step(trainer: Trainer) -> None:
    """Take one optimizer step back from the loop's counters: the step in progress, or the last one, was not applied."""
    progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
    for counters in (progress.total, progress.current):
        counters.ready -= 1
        counters.completed -= 1


def logger_step(trainer: Trainer) -> int:
    """The step that Lightning gives to loggers: attempted optimizer steps."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def publish_metrics(trainer: Trainer, metrics: dict[str, float], progress_bar: dict[str, float]) -> None:
    """Offer metrics to ModelCheckpoint, EarlyStopping and the progress bar, outside of `LightningModule.log`."""
    connector = trainer._logger_connector
    tensors = {key: torch.tensor(value) for key, value in metrics.items()}
    connector._callback_metrics.update(tensors)
    connector._logged_metrics.update(tensors)
    connector._progress_bar_metrics.update(progress_bar)


def before_checkpoint(trainer: Trainer, prepare: Callable[[], None]) -> Callable[[], None]:
    """Call ``prepare`` before the trainer collects a checkpoint; returns the function that undoes this."""
    connector = trainer._checkpoint_connector
    dump = connector.dump_checkpoint

    def prepared_dump(*args: Any, **kwargs: Any) -> dict[str, Any]:
        prepare()
        return dump(*args, **kwargs)

    connector.dump_checkpoint = prepared_dump  # type: ignore[method-assign]

    def undo() -> None:
        connector.__dict__.pop("dump_checkpoint", None)

    return undo


def grad_scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The precision plugin's GradScaler, if there is an active one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def scaler_has_unscaled(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Whether this step's gradients of the optimizer are unscaled already."""
    return bool(scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"])


def scaler_found_overflow(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    """Whether the scaler saw a non-finite gradient in this step (reads from the device)."""
    found: Iterable[torch.Tensor] = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
    return any(bool(each.item()) for each in found)


def supports_device_decisions(optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel takes ``grad_scale`` and ``found_inf`` from the device (fused Adam and SGD)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def handles_own_steps(trainer: Trainer) -> bool:
    """Whether the strategy's engine clips, accumulates and steps by itself (DeepSpeed)."""
    return bool(trainer.strategy.handles_gradient_accumulation)


def scheduler_interval(trainer: Trainer, scheduler: Any) -> str | None:
    """``"step"`` or ``"epoch"``: when Lightning steps this scheduler of the module; None if it does not know it."""
    for config in trainer.lr_scheduler_configs:
        if config.scheduler is scheduler:
            return str(config.interval)
    return None


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the trainer only tries out a few batches and writes nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def log_interval(trainer: Trainer) -> int:
    """Every how many steps metrics go to the loggers; 0 in Lightning means never, which here is a very long time."""
    return int(trainer.log_every_n_steps) or 2**62  # type: ignore[attr-defined]


def resumes_from_checkpoint(trainer: Trainer) -> bool:
    """Whether this fit continues from a checkpoint file."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint) or trainer.ckpt_path is not None


def unwrapped(module: LightningModule) -> LightningModule:
    """The module itself where torch.compile wrapped it."""
    return getattr(module, "_orig_mod", module)


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Everything that a checkpoint holds; the tensors are the live ones. Must be called on all ranks.

    What was prepared with `before_checkpoint` happens first.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def window_is_open(trainer: Trainer) -> bool:
    """Whether gradients of the batch that just ended wait for more before the optimizer steps (accumulation)."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def batches_seen(trainer: Trainer) -> int:
    """Training batches of this rank since the start of the run."""
    return int(trainer.fit_loop.epoch_loop.total_batch_idx) + 1


def reads_own_checkpoints(trainer: Trainer) -> bool:
    """Whether the strategy reads and writes checkpoints in its own way, past every CheckpointIO (sharded ones)."""
    mine = type(trainer.strategy)
    return mine.load_checkpoint is not Strategy.load_checkpoint or mine.save_checkpoint is not Strategy.save_checkpoint


def sigterm_is_lightnings(trainer: Trainer) -> bool:
    """Whether SIGTERM is handled by Lightning's fit alone: nobody else had or has taken it."""
    connector = trainer._signal_connector
    before = connector._original_handlers.get(signal.SIGTERM)
    lightnings = type(signal.getsignal(signal.SIGTERM)).__module__ == type(connector).__module__
    return lightnings and before in (None, signal.SIG_DFL)


def may_be_last_batch(trainer: Trainer) -> bool:
    """Whether the epoch or the fit may end with the batch in progress."""
    return bool(trainer.is_last_batch) or 0 < trainer.max_steps <= trainer.global_step or trainer.should_stop


# ---- the train loader: fetching, counting, validation in between --------------------------------------------------


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


def count_left_out(trainer: Trainer, batches: int) -> None:
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


def takes_index_tap(loader: Any) -> bool:
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
