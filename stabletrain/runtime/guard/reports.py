"""What the guard says of the steps: events for the log and for callbacks, metrics, and the line at the end of a fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.events import Event, Request
from stabletrain.core.outcome import Outcome
from stabletrain.runtime.guard import dropped_steps, publishing
from stabletrain.runtime.guard.dropped_steps import DroppedStep
from stabletrain.runtime.guard.loss_scaling import LossScaling
from stabletrain.runtime.guard.members import Member
from stabletrain.runtime.guard.step_history import StepHistory
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.records.event_log import EventLog, say_end
from stabletrain.settings import worded

_PROGRESS_BAR = {"loss": "loss", "grad_norm": "grad_norm", "clipped": "clipped_share", "skipped": "skipped"}
"""Words in the progress bar, and the metrics that they show."""


class Reports:
    """The events and metrics of one fit.

    Args:
        trainer: of the guard.
        module: the module that is trained.
        history: the steps that the metrics are of.
        path: file for the events.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, history: StepHistory, path: Path) -> None:
        self._trainer, self._module, self._history = trainer, module, history
        quiet = not trainer.is_global_zero or trainer_internals.is_fast_dev_run(trainer)
        self.log = EventLog(None if quiet else path, log_warnings=trainer.is_global_zero)
        self.optimizer = ""
        """While an outcome is passed on: the name of its optimizer, if there are several."""
        self.dropped: DroppedStep | None = None
        """The last step that was dropped."""
        self._told_of_nonfinite = False

    def report(self, event: Event) -> None:
        """Write an event to the log, then pass it to every callback with ``on_stability_event`` (see `hooks`)."""
        if self.dropped is not None:
            event = self.dropped.describe(event)
        event = event._replace(reason=worded(event.reason))
        if name := self.optimizer:
            event = event._replace(optimizer=name, reason=f"{name}: {event.reason}")
        self.log.append(event)
        if event.kind == "rollback":
            counters = self._history.counters
            self._history.counters = counters._replace(rollbacks=counters.rollbacks + 1)
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            listen: Any = getattr(callback, "on_stability_event", None)
            if listen is not None:
                listen(self._trainer, self._module, event)

    def named(self, request: Request) -> Request:
        """A request that says of which optimizer it is, if there are several."""
        name = self.optimizer
        return request._replace(reason=f"{name}: {request.reason}") if name else request

    def nonfinite(self, outcome: Outcome) -> bool:
        """Report, once in a fit, that a non-finite step was applied because no plugin drops such steps.

        Args:
            outcome: of a step whose loss or norm is not finite.
        """
        loss, norm = outcome.loss, outcome.grad_norm
        if self._told_of_nonfinite or not outcome.applied:
            return False
        self._told_of_nonfinite = True
        reason = (
            f"a step with loss {loss:.6g} and grad_norm {norm:.6g} was applied, because no plugin drops non-finite "
            "steps; the weights may be NaN from now on, and further such steps may not be reported. Add a plugin that "
            "drops them (config key plugins/nonfinite=skip)"
        )
        value = norm if math.isfinite(loss) else loss
        self.report(Event(outcome.step, "guard", "nonfinite", value, math.nan, reason))
        return True

    def missing_loss(self, outcome: Outcome, ranks: int, weighs: bool) -> None:
        """Report that a step was dropped for a missing loss.

        Args:
            outcome: of the step.
            ranks: number of processes.
            weighs: whether micro-batches have weights, which may all be 0.
        """
        reason = f"training_step gave no loss on one of {ranks} ranks or more: step skipped"
        if weighs:
            lacking = f", or {reason.removesuffix(': step skipped')}" if ranks > 1 else ""
            reason = f"every micro-batch of the step has a count of 0{lacking}: step skipped"
        number = float(self._history.counters.without_loss)
        self.report(Event(outcome.step, "guard", "skip", number, math.nan, reason))

    def publish(self, scaling: LossScaling, members: Iterable[Member]) -> None:
        """Send the metrics since the last call to the loggers, the progress bar and ``callback_metrics``.

        Args:
            scaling: the loss scaler.
            members: whose metrics are sent, too.
        """
        metrics: dict[str, float] = {}
        shown: dict[str, float] = {}
        steps = self._history
        for own, name, counters in zip(steps.each, steps.names, steps.counted, strict=True):
            taken = own.metrics.take(counters)
            if taken:
                taken |= scaling.metrics(counters)
                taken["lr"] = float(own.lr)
            suffix = f"/{name}" if name else ""
            metrics |= {f"{key}{suffix}": value for key, value in taken.items()}
            shown |= {f"{word}{suffix}": taken[key] for word, key in _PROGRESS_BAR.items() if key in taken}
        if metrics and len(steps.each) > 1:  # of all optimizers together
            metrics |= {"skipped": float(steps.counters.skipped), **scaling.metrics(steps.counters)}
        for member in members:
            metrics.update(member.metrics())
        if metrics:
            publishing.publish(self._trainer, metrics, shown)

    def say_end(self, keys: Mapping[str, str]) -> None:
        """One line about the steps of the run, and a warning if many were dropped.

        Args:
            keys: config keys of the plugins that may drop steps, by name.
        """
        self.log.show()
        counters = self._history.counters
        warning = dropped_steps.warning(counters, keys)
        say_end(dropped_steps.summary(counters, self.log.path if self.log.counts else None), warning)
