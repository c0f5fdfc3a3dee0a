"""What the plugins of one Trainer share between the steps; `stabletrain.runtime.guard.step_guard` adds the step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer

from stabletrain.core.events import Event, Request
from stabletrain.core.outcome import Outcome
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.guard import support
from stabletrain.runtime.guard.changes import Changes
from stabletrain.runtime.guard.loss_scaling import LossScaling
from stabletrain.runtime.guard.manual_steps import ManualSteps
from stabletrain.runtime.guard.members import Member, RuleMember
from stabletrain.runtime.guard.metrics import Counters
from stabletrain.runtime.guard.reports import Reports
from stabletrain.runtime.guard.rewarming import Rewarming
from stabletrain.runtime.guard.step_control import StepControl
from stabletrain.runtime.guard.step_history import StepHistory
from stabletrain.runtime.guard.trained_parameters import TrainedParameters
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.records import run_files
from stabletrain.runtime.records.event_log import logger


class SharedGuard(ABC):
    """The history of the steps, events and metrics, announced changes, and the state for a checkpoint.

    Args:
        trainer: the trainer whose callbacks contain the members.
        module: the module that is trained.
        members: all callbacks that share this guard, in the order of the list.
        events: file for the event log; None: ``events.jsonl`` in the logger's folder.
    """

    ranks: Ranks
    _scaling: LossScaling

    def __init__(
        self, trainer: Trainer, module: LightningModule, members: Sequence[Member], events: Path | None
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.members = list(members)
        self.changes = Changes()
        self.rewarming = Rewarming(trainer)
        self._history = StepHistory(trainer, self.rewarming, self.changes)
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a collective: called on every rank
        self._reports = Reports(trainer, module, self._history, events or Path(folder) / run_files.EVENTS)
        self.events = self._reports.log
        self._active = support.active_members(trainer, members)
        self._rules = [cast(RuleMember, m) for m in self._active if m.sets_limits]
        self._manual: ManualSteps | None = None
        self._pending: Callable[[], Outcome] | None = None
        self._requests: list[Request] = []
        self._weights: list[float] = []
        self.is_open = False

    @abstractmethod
    def settle(self, alone: bool = False) -> None:
        """Read the pending outcome and pass it to all members; see `StepGuard`."""

    @abstractmethod
    def check_state(self, now: bool = False) -> bool:
        """Whether no plugin finds weights and optimizer state damaged; see `StepGuard`."""

    # ---- the steps so far -------------------------------------------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """The steps of the run."""
        return self._history.counters

    @property
    def decided(self) -> int:
        """Attempted steps, including one whose outcome is pending."""
        return self.counters.attempted + (self._pending is not None)

    @property
    def loss_scale(self) -> float:
        """The factor of the loss scaler on the loss at this step; 1 without one."""
        return self._scaling.scale

    @property
    def weights_of_window(self) -> list[float]:
        """The weights of the micro-batches of the window in progress, or just decided; empty if all weigh the same."""
        return self.window.weights or self._weights

    @property
    def window(self) -> AccumulationWindow:
        """The window of micro-batches in progress."""
        return self._history.own.window

    @property
    def parameters(self) -> TrainedParameters:
        """Those of the selected optimizer."""
        return self._history.own.parameters

    @property
    def control(self) -> StepControl:
        """The step control of the selected optimizer in this fit."""
        return self._history.own.control

    @property
    def all_parameters(self) -> list[TrainedParameters]:
        """Those of each optimizer."""
        return [each.parameters for each in self._history.each]

    # ---- events and metrics -----------------------------------------------------------------------------------------

    def report(self, event: Event) -> None:
        """Write an event to the log, then pass it to every callback with ``on_stability_event`` (see `hooks`)."""
        self._reports.report(event)

    def flush(self) -> None:
        """Send the metrics since the last flush to the loggers, the progress bar and ``callback_metrics``."""
        self._reports.publish(self._scaling, self._active)

    def say_end(self) -> None:
        """Called when the fit ends, for whatever reason: one line about its steps, a warning if many were dropped."""
        if self.trainer.is_global_zero:
            keys = {each.rule.label: f"plugins.{each.rule.slot}" for each in self._rules}
            self._reports.say_end(keys)

    # ---- changes ----------------------------------------------------------------------------------------------------

    def rewarm(self, request: Request) -> None:
        """Let the learning rate climb again from the next step on, over ``request.steps`` applied steps."""
        self.settle()  # a step in flight may have been dropped
        first = self.rewarming.start(request.steps)
        reason = f"learning rate climbs over {request.steps} steps from step {first}: {request.reason}"
        steps, attempted = float(request.steps), self.counters.attempted - 1
        self.report(Event(attempted, request.plugin, "rewarm", steps, math.nan, reason))

    def _before_checkpoint(self) -> None:
        """Observe the outcome in flight, and learn anew if any rank announced a change since the last decision."""
        # after an exception of one rank the others do not get here
        together = self.trainer.state.status == "running"
        self.settle(alone=not together)
        if together and not self.check_state(now=True) and self.trainer.is_global_zero:
            logger.warning(
                "a checkpoint is saved at step %d although ranks have different weights: it may hold the damaged ones. "
                "Do not resume from it; plugins/checkpoints=save saves none then",
                self.trainer.global_step,
            )
        announced = bool(self.changes.announced)
        if self.ranks.any(announced) if together else announced:
            self._apply_announced(self.changes.take())

    def _apply_announced(self, reasons: tuple[str, ...]) -> None:
        self._learn_anew("guard", "; ".join(reasons) or "announced on another rank")

    def _learn_anew(self, plugin: str, reason: str) -> None:
        """Let all members learn their baselines anew, from the next observed outcome on; the last one is observed."""
        for member in self.members:
            member.on_change()
        self.report(Event(self.counters.attempted, plugin, "announced", self.trainer.global_step, math.nan, reason))

    # ---- state ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The guard's own state, in plain Python types; an outcome in flight is observed first."""
        self.settle(alone=True)  # a checkpoint may be saved by one rank
        return self._history.state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; what is missing stays as it is."""
        self._history.load(state, has_optimizers=self.is_open)

    def request(self, request: Request) -> None:
        """Let a request be executed at the end of this batch, or of the next one if this batch's have been executed."""
        self._requests.append(request)

    def drop_requests(self) -> None:
        """Drop the requests that are not executed yet: something else has answered them."""
        self._requests.clear()

    def after_restore(self, state: Mapping[str, Any]) -> None:
        """After the state of an earlier step was restored: restore the guard's, drop pending losses and requests.

        The counts of steps are not restored.

        Args:
            state: what `state_dict` returned at that step; may be empty.
        """
        self._history.go_back(state)
        if self._manual is not None:
            self._manual.clear()
        self._requests.clear()
