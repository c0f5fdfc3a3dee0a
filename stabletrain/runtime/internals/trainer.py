"""Every use of private attributes of Lightning's Trainer and of torch, each with a test.

The modules `loader`, `manual` and `state` contain those of the train loaders, of steps by hand and of the state of a
run. No other module uses private attributes, so if a new version of Lightning changes one, a single function and its
test in tests/runtime/internals fail.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from stabletrain.runtime.internals.packages import both, own

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
    """Let Lightning skip the per-step hooks that a callback inherits without using them (about 1.4 microseconds each).

    Lightning calls a hook only if the attribute is callable, so on the instance an inherited hook is set to None.

    Args:
        callback: the callback.
        among: the base class whose own hooks are not needed on this instance.
    """
    for hook in STEP_HOOKS:
        if getattr(type(callback), hook) in [getattr(each, hook) for each in (*both(Callback), among)]:
            callback.__dict__[hook] = None


def restore_step_hooks(callback: Callback) -> None:
    """Undo `silence_step_hooks`."""
    for hook in STEP_HOOKS:
        if callback.__dict__.get(hook, callback) is None:
            del callback.__dict__[hook]


def step_progress(trainer: Trainer) -> Any:
    """The loop's counters of optimizer steps, from which ``trainer.global_step`` is read."""
    loop = trainer.fit_loop.epoch_loop
    if trainer.lightning_module.automatic_optimization:
        return loop.automatic_optimization.optim_progress.optimizer.step
    return loop.manual_optimization.optim_step_progress


def undo_global_step(trainer: Trainer) -> None:
    """Subtract one optimizer step from the loop's counters: the step in progress, or the last one, was not applied."""
    progress = step_progress(trainer)
    for counters in (progress.total, progress.current):
        counters.ready -= 1
        counters.completed -= 1


def logger_step(trainer: Trainer) -> int:
    """The step that Lightning passes to loggers: attempted optimizer steps."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def logged_names(trainer: Trainer, progress_bar: bool = False) -> set[str]:
    """The names under which the module and callbacks have logged in training and validation, by ``self.log``.

    Args:
        trainer: in a fit.
        progress_bar: only those that they show in the progress bar.
    """
    loop = trainer.fit_loop.epoch_loop
    names: set[str] = set()
    for results in (loop._results, loop.val_loop._results):
        for each in results.values():
            if each.meta.prog_bar or not progress_bar:
                names |= {name for on_step in (True, False) for name in results._forked_name(each, on_step)}
    return names


def publish_metrics(
    trainer: Trainer,
    metrics: Mapping[str, float],
    progress_bar: Mapping[str, float],
    copies: Mapping[str, str] | None = None,
) -> None:
    """Publish metrics for ModelCheckpoint, EarlyStopping and the progress bar, without `LightningModule.log`.

    Args:
        trainer: in a fit.
        metrics: by name.
        progress_bar: by name.
        copies: further names in ``callback_metrics``, each with the name in ``metrics`` of its value, which is the same
            object. A name under which there is another value is left alone.
    """
    connector = trainer._logger_connector
    present = connector._callback_metrics
    free = {
        other: name
        for other, name in (copies or {}).items()
        if other not in present or present[other] is present.get(name)
    }
    tensors = {key: torch.tensor(value) for key, value in metrics.items()}
    present.update(tensors)
    present.update({other: tensors[name] for other, name in free.items()})
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


def loop_states(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The state of the trainer's loops, as it is saved in a checkpoint."""
    return trainer._checkpoint_connector._get_loops_state_dict()


def around_restoring(trainer: Trainer, wrap: Callable[[str, Callable[[], None]], None]) -> Callable[[], None]:
    """Call ``wrap(what, restore)`` in place of each ``restore`` of the state of callbacks, loops and the like.

    Weights and optimizer states are not included.

    Args:
        trainer: before it restores a checkpoint.
        wrap: gets the name of what is restored, and the function that does it.

    Returns:
        The function that undoes this.
    """
    connector = trainer._checkpoint_connector
    restored = {
        "restore_datamodule": "data module",
        "restore_callbacks": "callbacks",
        "restore_precision_plugin_state": "precision",
        "restore_loops": "loops",
        "restore_lr_schedulers": "learning-rate schedulers",
    }
    for method, what in restored.items():
        connector.__dict__[method] = functools.partial(wrap, what, getattr(connector, method))

    def undo() -> None:
        for method in restored:
            connector.__dict__.pop(method, None)

    return undo


def hide_output(trainer: Trainer, hides: Callable[[], bool]) -> Callable[[], None]:
    """Make a batch's output empty if ``hides`` says so, as Lightning's is when ``training_step`` returned None.

    Args:
        trainer: in a fit.
        hides: called after each batch.

    Returns:
        The function that undoes this.
    """
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    run = loop.run

    def run_and_hide(*args: Any, **kwargs: Any) -> dict[str, Any]:
        output = run(*args, **kwargs)
        return {} if hides() else output

    loop.run = run_and_hide  # type: ignore[method-assign]

    def undo() -> None:
        loop.__dict__.pop("run", None)

    return undo


def skips_backward(trainer: Trainer) -> bool:
    """Whether batches are only passed through the module, as in the last epoch of StochasticWeightAveraging.

    Lightning calls the optimizer there too, without gradients.
    """
    return bool(trainer.fit_loop._skip_backward)


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


def scale_on_device(scaler: torch.amp.GradScaler) -> torch.Tensor:
    """The scaler's scale as a tensor, which `GradScaler.update` changes; ``get_scale`` would read the device."""
    scale = scaler._scale
    assert scale is not None, "the scaler makes it when it scales the first loss"
    return scale


def mark_scaler_overflow(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> None:
    """Let the scaler treat this step as an overflow: it will not call ``optimizer.step``, and lowers its scale."""
    for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
        found.fill_(1.0)


def supports_device_decisions(optimizer: Optimizer) -> bool:
    """Whether the optimizer's kernel takes ``grad_scale`` and ``found_inf`` from the device (fused Adam and SGD)."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def handles_own_steps(trainer: Trainer) -> bool:
    """Whether the strategy's engine clips, accumulates and steps by itself (DeepSpeed)."""
    return bool(trainer.strategy.handles_gradient_accumulation)


def scheduler_interval(trainer: Trainer, scheduler: Any) -> str | None:
    """``"step"`` or ``"epoch"``: when Lightning steps a scheduler of the module; None if Lightning does not step it."""
    for config in trainer.lr_scheduler_configs:
        if config.scheduler is scheduler:
            return str(config.interval)
    return None


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the trainer runs a few batches as a test and writes nothing."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def log_interval(trainer: Trainer) -> int:
    """Steps between two flushes of metrics; Lightning's 0 (never) becomes a number that no run reaches."""
    return int(trainer.log_every_n_steps) or 2**62  # type: ignore[attr-defined]


def resumes_from_checkpoint(trainer: Trainer) -> bool:
    """Whether this fit continues from a checkpoint file."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint) or trainer.ckpt_path is not None


def is_trial(trainer: Trainer) -> bool:
    """Whether `LearningRateFinder`, `BatchSizeFinder` or the `Tuner` make trial steps, which are no steps of the run.

    They replace all callbacks for that time, by none or by one of their own.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return not callbacks or [type(each).__name__ for each in callbacks] == ["_LRCallback"]


def has_all_modules(module: LightningModule) -> bool:
    """Whether its layers exist before a fit: it has no ``configure_model`` of its own, which may still make some."""
    return type(module).configure_model in [each.configure_model for each in both(LightningModule)]


def unwrapped(module: LightningModule) -> LightningModule:
    """The module itself where torch.compile wrapped it."""
    return getattr(module, "_orig_mod", module)


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The content of a checkpoint; its tensors are not copied. A collective.

    The functions registered with `before_checkpoint` are called first.
    """
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def window_is_open(trainer: Trainer) -> bool:
    """Whether gradients are accumulated for which the optimizer has not stepped yet.

    False before the first batch of an epoch.
    """
    loop = trainer.fit_loop.epoch_loop
    batches: Any = loop.batch_progress.current
    return bool(batches.processed) and bool(loop._should_accumulate())


def batches_seen(trainer: Trainer) -> int:
    """Training batches of this rank since the start of the run."""
    return int(trainer.fit_loop.epoch_loop.total_batch_idx) + 1


def reads_own_checkpoints(trainer: Trainer) -> bool:
    """Whether the strategy reads and writes checkpoints itself, without a CheckpointIO (sharded ones)."""
    mine = type(trainer.strategy)
    base = own(Strategy, trainer.strategy)  # type: ignore[type-abstract]
    return mine.load_checkpoint is not base.load_checkpoint or mine.save_checkpoint is not base.save_checkpoint


def sigterm_is_lightnings(trainer: Trainer) -> bool:
    """Whether Lightning's handler of SIGTERM is installed, and no other handler was installed before or after it."""
    connector = trainer._signal_connector
    before = connector._original_handlers.get(signal.SIGTERM)
    lightnings = type(signal.getsignal(signal.SIGTERM)).__module__ == type(connector).__module__
    return lightnings and before in (None, signal.SIG_DFL)


def requeue_handler(trainer: Trainer) -> tuple[signal.Signals, Callable[..., None]] | None:
    """Lightning's handler of the signal by which SLURM announces the end of a job, if it is installed."""
    connector = trainer._signal_connector
    environment: Any = trainer._accelerator_connector.cluster_environment
    signum: signal.Signals | None = getattr(environment, "requeue_signal", None)
    if signum is None:
        return None
    handler: Any = signal.getsignal(signum)
    return (signum, handler) if type(handler).__module__ == type(connector).__module__ else None


def ends_run(trainer: Trainer) -> bool:
    """Whether the fit ends with the batch in progress, as far as steps and epochs tell."""
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    last_epoch = 0 < epochs <= trainer.current_epoch + 1
    return 0 < trainer.max_steps <= trainer.global_step or (bool(trainer.is_last_batch) and last_epoch)


def may_be_last_batch(trainer: Trainer) -> bool:
    """Whether the epoch or the fit may end with the batch in progress."""
    return bool(trainer.is_last_batch) or 0 < trainer.max_steps <= trainer.global_step or trainer.should_stop


def may_validate(trainer: Trainer) -> bool:
    """Whether validation may follow directly on the batch in progress; asked in ``on_train_batch_end``."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    if not trainer.enable_validation or fetcher is None:
        return False
    by_time = getattr(trainer, "_val_check_time_interval", None) is not None
    return by_time or bool(loop._should_check_val_fx(fetcher))
