"""Callbacks that prepare themselves in ``on_train_epoch_start``, in a run that resumes after that hook was called."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer


def show_progress(trainer: Trainer, within_epoch: bool) -> None:
    """Let progress bars show the epoch's number of batches, and how many of them were trained on.

    Args:
        trainer: at the start of its training loop.
        within_epoch: whether the run resumes within an epoch; otherwise the hook will be called.
    """
    bar: Any = trainer.progress_bar_callback
    if bar is None or not within_epoch:
        return
    bar.on_train_epoch_start(trainer, trainer.lightning_module)
    shown: Any = getattr(bar, "train_progress_bar", None) if _is_shown(bar) else None
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    for name in ("n", "initial", "completed"):  # of tqdm (the rate counts from the initial value), and of rich
        if hasattr(shown, name):
            setattr(shown, name, done)
    if callable(getattr(shown, "refresh", None)):
        shown.refresh()


def _is_shown(bar: Any) -> bool:
    """Whether it is one of Lightning's bars, and shows anything; ``ProgressBar``, their base class, has no switch."""
    return getattr(bar, "train_progress_bar_id", 0) is not None and getattr(bar, "is_enabled", False)


def restore_weight_averaging(trainer: Trainer) -> None:
    """Let StochasticWeightAveraging put its scheduler back, which it creates in the hook only.

    Without it no scheduler steps until the next epoch, and creating it then changes the learning rate.

    Args:
        trainer: at the start of its training loop, after optimizers and callbacks were restored.
    """
    module = trainer.lightning_module
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not _had_started(callback):
            continue
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ]
        tensors = {name: each.detach().clone() for name, each in _tensors(module).items()}
        callback.on_train_epoch_start(trainer, module)
        for group, kept in zip((g for o in trainer.optimizers for g in o.param_groups), groups, strict=True):
            group.update(kept)
        with torch.no_grad():
            for name, each in _tensors(module).items():  # in its last epoch it resets batch normalisation
                each.copy_(tensors[name])


def _had_started(callback: Callback) -> bool:
    """Whether it is a StochasticWeightAveraging that was restored from a checkpoint in which it was at work."""
    is_one = any(each.__name__ == "StochasticWeightAveraging" for each in type(callback).__mro__)
    state: Any = vars(callback)
    return is_one and state.get("_scheduler_state") is not None and not state.get("_initialized")


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
