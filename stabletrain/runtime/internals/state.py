"""The private attributes of Lightning, torch and torchmetrics that a snapshot reads and writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.loops.progress import _BaseProgress
from torch import nn
from torch.optim import Optimizer
from torchmetrics import Metric

from stabletrain.runtime.internals.optimizer_attributes import ZERO, find
from stabletrain.runtime.internals.packages import both
from stabletrain.runtime.internals.trainer import step_progress

_METRIC_FIELDS = ("_update_count", "_computed", "_forward_cache")
"""Attributes of a metric that change at each update, besides its states."""


def progress(trainer: Trainer) -> list[dict[str, Any]]:
    """The counters of the fit loop and of its inner loops; not the step that loggers use, which must never decrease."""
    return [tracker.state_dict() for tracker in _trackers(trainer.fit_loop)]


def set_progress(trainer: Trainer, states: Sequence[dict[str, Any]]) -> None:
    """Restore the counters; no loop restarts.

    Args:
        trainer: in a fit.
        states: from `progress`.
    """
    for tracker, state in zip(_trackers(trainer.fit_loop), states, strict=True):
        tracker.load_state_dict(state)


def _trackers(loop: _Loop) -> Iterator[_BaseProgress]:
    for value in vars(loop).values():
        if isinstance(value, both(_BaseProgress)):
            yield value
        elif isinstance(value, both(_Loop)):
            yield from _trackers(value)


def set_global_step(trainer: Trainer, step: int) -> None:
    """Set the count of applied optimizer steps."""
    counts = step_progress(trainer).total
    counts.ready = counts.completed = step


def epoch_averages(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """The averages of ``self.log(on_epoch=True)`` in this epoch; Lightning replaces their tensors at each update."""
    results = trainer.fit_loop.epoch_loop._results
    return {key: dict(metric_fields(metric)) for key, metric in results.items()}


def set_epoch_averages(trainer: Trainer, saved: dict[str, dict[str, Any]]) -> None:
    """Restore the averages; those that were first logged after they were saved are removed.

    Args:
        trainer: in a fit.
        saved: from `epoch_averages`.
    """
    results = trainer.fit_loop.epoch_loop._results
    for key in list(results):
        if key not in saved:
            del results[key]
        else:
            vars(results[key]).update(saved[key])


def metric_fields(metric: Metric) -> dict[str, Any]:
    """The states of a torchmetrics metric, which are no parameters or buffers, and its other changing attributes."""
    names = [*metric._defaults, *(name for name in (*_METRIC_FIELDS, "has_reset") if name in vars(metric))]
    return {name: getattr(metric, name) for name in names}


def metrics_in(module: nn.Module) -> list[Metric]:
    """The torchmetrics metrics inside a module."""
    return [each for each in module.modules() if isinstance(each, Metric)]


def buffer_owners(module: nn.Module) -> list[nn.Module]:
    """A module and its submodules that have buffers, without metrics."""
    return [each for each in module.modules() if each._buffers and not isinstance(each, Metric)]


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The dictionary of a module's own buffers itself, not a copy; non-persistent ones included."""
    return module._buffers


def averages_in(callback: Callback, module: LightningModule) -> list[nn.Module]:
    """Models in a callback's attributes that are not in the trained module, as the average of ``WeightAveraging``."""
    models = [each for each in vars(callback).values() if isinstance(each, nn.Module)]
    trained = set(module.modules()) if models else set()
    return [each for each in models if each not in trained]


def state_holders(optimizer: Optimizer, model: nn.Module) -> list[Optimizer]:
    """The optimizer and those that it holds, wherever: ZeroRedundancyOptimizer has its state in ``.optim``."""
    return find(optimizer, model).optimizers


def divides_state(optimizer: Optimizer) -> bool:
    """Whether each rank has the optimizer state of some parameters only, all of each: ZeroRedundancyOptimizer."""
    return any(base.__name__ == ZERO for base in type(optimizer).__mro__)
