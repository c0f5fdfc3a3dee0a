"""The gap between validation and training loss, and an event when only the training loss still falls."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer

from stabletrain.core import metric_names
from stabletrain.core.events import Event
from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.outcome import Outcome
from stabletrain.errors import UserError, is_number, is_whole, require
from stabletrain.runtime.guard.callbacks import GuardMember

METRICS = (
    MetricInfo("stability/overfitting_gap", "the loss's", "monitored validation loss minus the mean training loss"),
)


class WatchOverfitting(GuardMember):
    """Report when the validation loss no longer improves, and the training loss still falls.

    After every validation, ``stability/overfitting_gap`` is the monitored loss minus the mean loss of the training
    steps since the last validation. If in ``patience`` validations in a row the monitored loss was not better than its
    best by more than ``min_delta``, and their mean training loss is lower than that before the best validation, there
    is an event of kind ``overfitting``; the next one follows only after the monitored loss has improved again. The run
    is not changed: Lightning's EarlyStopping ends it (config ``plugins/stopping=early``).

    Args:
        monitor: name of a validation loss that the module logs, lower is better; compared with the training loss, so
            of the same kind.
        patience: validations in a row without an improvement, >= 1.
        min_delta: smallest improvement, in the unit of the loss, >= 0.

    Raises:
        UserError: if an argument is out of range, or, after the first validation, if no metric has the name.

    >>> WatchOverfitting("val_loss", patience=5).patience
    5
    """

    plugin: ClassVar[str] = "watch_overfitting"
    slot: ClassVar[str] = "overfitting"

    def __init__(self, monitor: str = "val/loss", patience: int = 3, min_delta: float = 0.0) -> None:
        for key, value, is_right, expected in (
            ("monitor", monitor, isinstance(monitor, str) and bool(monitor), "the name of a metric"),
            ("patience", patience, is_whole(patience) and patience >= 1, "a whole number >= 1"),
            ("min_delta", min_delta, is_number(min_delta) and 0 <= min_delta < math.inf, "a number >= 0"),
        ):
            require(is_right, self.plugin, key, expected, value, f"plugins.{self.slot}", type(self).__name__)
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.reset()

    @property
    def state_key(self) -> str:
        """The key of this plugin's state in a checkpoint."""
        return self.plugin

    def reset(self) -> None:
        """No validation yet."""
        self._sum, self._count = 0.0, 0
        self._best: float | None = None
        self._train_at_best = 0.0
        self._train_since: list[float] = []
        self._gap: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse several optimizers, whose losses have no common mean."""
        super().on_train_start(trainer, pl_module)
        if self._several:
            raise UserError(
                f"{self.plugin}: expected a module with one optimizer, got {len(self._optimizer_names)}, whose losses "
                f"differ; remove it (config key plugins/{self.slot}=none)"
            )

    def on_outcome(self, outcome: Outcome) -> None:
        """Add the loss of an applied step to the mean."""
        if outcome.applied and math.isfinite(outcome.loss):
            self._sum, self._count = self._sum + outcome.loss, self._count + 1

    def on_change(self) -> None:
        """The loss is another one from now on: forget the validations of before."""
        self.reset()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the monitored loss with its best."""
        super().on_validation_end(trainer, pl_module)
        guard = self._guard
        if guard is None or trainer.sanity_checking or not guard.is_training or not self._count:
            return
        value = self._value(trainer)
        train, self._sum, self._count = self._sum / self._count, 0.0, 0
        self._gap = value - train if math.isfinite(value) else None
        if not math.isfinite(value):
            return
        if self._best is None or value < self._best - self.min_delta:
            self._best, self._train_at_best, self._train_since = value, train, []
            return
        self._train_since.append(train)
        since, patience = self._train_since, self.patience
        if len(since) == patience and (mean := math.fsum(since) / patience) < self._train_at_best:
            reason = (
                f"{self.monitor} was not below {self._best:.4g} in {patience} validations (now "
                f"{value:.4g}), while the training loss fell from {self._train_at_best:.4g} to {mean:.4g}"
            )
            guard.report(Event(guard.counters.attempted - 1, self.plugin, "overfitting", value, self._best, reason))

    def metrics(self) -> dict[str, float]:
        """The gap after the last validation."""
        return {} if self._gap is None else {"overfitting_gap": self._gap}

    def state_dict(self) -> dict[str, Any]:
        """The best validation, and the training losses since."""
        plain = super().state_dict()  # must be first: it processes a pending outcome
        state = {
            "sum": self._sum,
            "count": self._count,
            "best": self._best,
            "train_at_best": self._train_at_best,
            "train_since": list(self._train_since),
            "gap": self._gap,
        }
        return {**plain, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore from a checkpoint."""
        super().load_state_dict(state_dict)
        state = state_dict["state"]
        since = state["train_since"]
        numbers = [*since, state["sum"], state["train_at_best"]]
        optional = [each for each in (state["best"], state["gap"]) if each is not None]
        if type(state["count"]) is not int or any(type(each) is not float for each in (*numbers, *optional)):
            raise TypeError("expected losses and a count")
        self._sum, self._count, self._train_since = state["sum"], state["count"], list(since)
        self._best, self._train_at_best, self._gap = state["best"], state["train_at_best"], state["gap"]

    def _value(self, trainer: Trainer) -> float:
        logged = metric_names.without_old_names(trainer.callback_metrics)
        value = logged.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(each for each in logged if not metric_names.is_own(each))) or "none"
            raise UserError(
                f"{self.plugin}: expected monitor to be a metric that the validation logs, got {self.monitor!r}; it "
                f"logs: {known} (config key plugins.{self.slot}.monitor)"
            )
        return float(torch.as_tensor(value))
