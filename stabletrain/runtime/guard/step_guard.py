"""The guard: measures a step, gets the limits of every rule, acts once, and passes the outcome to the rules.

     history --limits()-->  Limits --+
                                     +-->  ACT once:  skip? clip by?  -->  optimizer.step  -->  Outcome
     backward --MEASURE--> loss, g --+                                                            |
        ^                                                                                         |
        +------------ history <--observe()--> events, requests (rewarm < rollback < stop) <-------+

All plugins of a Trainer share one guard; the first plugin in ``trainer.callbacks`` forwards Lightning's hooks to it.
The limits of step t + 1 always use the outcomes up to step t, in both modes:

* *exact*: the host reads loss and norm before the step. The gradient is multiplied only if it is clipped.
* *device*: the decision is passed to the fused kernel as ``grad_scale`` and ``found_inf``; the host reads the outcome
  just before the next step, when the next backward is already queued.

docs/architecture.md shows where in Lightning's loop each method is called. `measurement` measures a step, `decisions`
gets the limits and acts, `step_control` drops a step, `step_history` has what is known of the steps so far, and
`reports` writes events and metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.core.events import Request, RequestKind
from stabletrain.core.outcome import Outcome
from stabletrain.runtime import gradients
from stabletrain.runtime.guard import support
from stabletrain.runtime.guard.decisions import Attempt, Decisions
from stabletrain.runtime.guard.dropped_steps import DroppedStep
from stabletrain.runtime.guard.loss_scaling import LossScaling
from stabletrain.runtime.guard.manual_steps import ManualSteps
from stabletrain.runtime.guard.measurement import measure
from stabletrain.runtime.guard.members import Member, TransformMember
from stabletrain.runtime.guard.missing_loss import MissingLosses
from stabletrain.runtime.guard.replica_check import ReplicaCheck
from stabletrain.runtime.guard.requests import execute
from stabletrain.runtime.guard.shared_guard import SharedGuard
from stabletrain.runtime.guard.short_windows import ShortWindows
from stabletrain.runtime.guard.step_checks import BackwardWatch
from stabletrain.runtime.guard.step_control import StepControl
from stabletrain.runtime.guard.strategy_checks import check_accumulation
from stabletrain.runtime.guard.support import DecisionMode
from stabletrain.runtime.hidden.hidden_state import HiddenState
from stabletrain.runtime.internals import manual as manual_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.ranks import Ranks


class StepGuard(SharedGuard):
    """The shared guard of one Trainer, for one fit.

    Args:
        trainer: the trainer whose callbacks contain the members.
        module: the module that is trained.
        members: all callbacks that share this guard, in the order of the list.
        mode: where decisions are made; ``"auto"`` chooses by device, optimizer and loss scaler.
        max_attempts: attempted steps after which the run is stopped; None: twice ``max_steps``, if that is set.
        events: file for the event log; None: ``events.jsonl`` in the logger's folder.
        weigh_windows: divide the gradient of a shorter accumulation window by the micro-batches that it holds, and not
            by the size of a full one as Lightning does.
        weigh_loss: multiplies the loss of a micro-batch, before its backward pass, by a weight, in place, and returns
            the weight (>= 0). The loss and the gradient of a step are then weighted means over the micro-batches of all
            ranks; a window whose weights are all 0 is dropped. None: all micro-batches weigh the same.

    Raises:
        UserError: if the guard does not support the module, the strategy or a hook.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        members: Sequence[Member],
        mode: DecisionMode = "auto",
        max_attempts: int | None = None,
        events: Path | None = None,
        weigh_windows: bool = False,
        weigh_loss: Callable[[Tensor], float] | None = None,
    ) -> None:
        support.check_setup(trainer, module, cast(Sequence[Callback], members))
        super().__init__(trainer, module, members, events)
        self.mode = mode
        self._max_attempts = max_attempts or (2 * trainer.max_steps if trainer.max_steps > 0 else None)
        # transforms do not commute: they run in the order of their names, whatever the order of the list
        transforms = [cast(TransformMember, m) for m in self._active if m.transforms_gradients]
        self._transforms = sorted(transforms, key=lambda m: (m.plugin, m.state_key))
        self._gradient_observers = [m for m in self._active if m.observes_gradients]
        self._outcome_observers = [m for m in self._active if m.observes_outcomes]
        self._recorders = [m for m in self._active if m.records_attempts]
        self._checkers = [m for m in self._active if m.checks_state]
        weighs = weigh_windows and module.automatic_optimization  # by hand, the module divides the losses
        self._short_windows = ShortWindows(trainer.is_global_zero) if weighs else None
        self._weigh_loss = weigh_loss if module.automatic_optimization else None
        self._batch_has_loss = False
        self._attempted = 0
        """Steps that were decided in the batch in progress."""
        self._has_begun = False
        self.is_training = False
        """As ``is_open``, but only until the training loop has ended."""
        self._undo: list[Callable[[], None]] = []

    # ---- the fit ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """``on_fit_start``: the optimizer exists. Choose the mode, and wrap the optimizer's step."""
        for member in self.members:
            member.on_optimizer_ready(self.trainer)
        support.check_optimizer(self.trainer)
        self._scaling = LossScaling(self.trainer)
        self.ranks = Ranks(self.trainer)
        self._several_ranks = self.ranks.size > 1
        self._replicas = ReplicaCheck(self.trainer, self.module, self.ranks)
        self._replicas.open(self.trainer.optimizers)
        self._missing_losses = MissingLosses(self.trainer, self.module)
        self._has_begun = False
        self._undo = [trainer_internals.before_checkpoint(self.trainer, self._before_checkpoint)]
        self._undo.append(self._missing_losses.undo)
        if self.module.automatic_optimization:
            self._control_steps([StepControl(self.trainer, self.module, self.rewarming, self.ranks)], None)
        else:
            self._control_manual_steps()
        for member in self.members:
            member.use_optimizers(self._history.names)
        device = self.parameters.read()[0].device
        self.on_device = support.decides_on_device(self.trainer, self.module, self.mode, device)
        self._decisions = Decisions(
            self.trainer,
            self._rules,
            self._transforms,
            self.changes,
            self._apply_announced,
            self.ranks,
            self._scaling,
            self.on_device,
        )
        self.watch = BackwardWatch(self.module, self.trainer.optimizers)
        self._unstepped = set(range(len(self._history.each)))
        self._log_every = trainer_internals.log_interval(self.trainer)
        self.is_open = self.is_training = True

    def _control_steps(self, controls: Sequence[StepControl], names: Sequence[str] | None) -> None:
        for each in controls:
            each.after_update = [member.on_update for member in self._active if member.follows_updates]
        self._history.begin(controls, self.module, self.ranks, names)
        self._undo.extend(each.undo for each in controls)

    def _control_manual_steps(self) -> None:
        """Control the steps of all optimizers, which the module makes by hand."""
        manual = self._manual = ManualSteps(self.trainer, self.module, self.ranks)
        fit = (self.trainer, self.module, self.rewarming, self.ranks)
        hidden = HiddenState(self.module)
        own = zip(manual.optimizers, manual.buffers, strict=True)
        controls = [StepControl(*fit, *each, hidden, undecided=manual.refuse_undecided) for each in own]
        self._control_steps(controls, manual.names)
        for steps, window in zip(self._history.each, manual.windows, strict=True):
            steps.window = window
        self._undo.append(manual_internals.after_manual_step(self.trainer, self._after_manual_step))
        self._undo.append(manual_internals.before_zero_grad(self.trainer, manual.remove))

    def close(self) -> None:
        """``teardown`` and ``on_exception``: restore everything that was replaced; a second call does nothing."""
        self.is_open = self.is_training = False
        self.events.show()
        while self._undo:
            self._undo.pop()()
        for own in self._history.each:
            own.window.clear()
        self._pending = None

    # ---- one step ---------------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """``on_train_epoch_end``: forget a window that was not finished, after ``on_train_batch_start`` returned -1."""
        if self._manual is None:  # by hand, gradients may be accumulated over the end of an epoch
            self._history.own.forget_window()

    def start_batch(self) -> None:
        """``on_train_batch_start``: copy the buffers before the first micro-batch of a window."""
        if not self._has_begun:
            self._has_begun = True
            check_accumulation(self.trainer)  # plans of windows need the train loader
            self._replicas.begin()  # strategies that shard load the weights after `open`
        if self._manual is not None:
            for own, window in zip(self._history.each, self._manual.windows, strict=True):
                if not window.may_be_open:
                    own.start_window()
        elif not (own := self._history.own).window.is_started:
            own.start_window()

    def take_loss(self, loss: Tensor) -> None:
        """``on_before_backward``: store a micro-batch's loss, divided by the window's size, times the loss scale."""
        if not self.watch.is_over:
            self.watch.before_backward()
        if self._manual is not None:
            self._manual.before_backward(loss)
            return
        self._batch_has_loss = True
        own, missing = self._history.own, self._missing_losses.take()
        if missing is not None:
            own.window.add_without_loss(drop=missing == "drop")
        elif self._weigh_loss is None:
            own.window.add(loss)
        else:
            own.window.weights.append(self._weigh_loss(loss))
            own.window.add(loss if own.window.weights[-1] else torch.zeros_like(loss))
        own.samples.add_batch()

    def end_backward(self) -> None:
        """``on_after_backward``: with manual optimization, store the loss for the optimizers that it reaches.

        Raises:
            UserError: in the first window, if the optimizer has made its step already.
        """
        self.watch.after_backward()
        if self._manual is not None:
            for index, loss in self._manual.after_backward():
                self._select(index)
                self.window.add(loss)
                self._history.own.samples.add_batch()

    def _select(self, index: int) -> None:
        """Select an optimizer, with the histories of all members."""
        self._history.selected = index
        for member in self.members:
            member.select_optimizer(index)

    def _after_manual_step(self) -> None:
        """The module has stepped an optimizer by hand: its outcome is history before the next backward pass."""
        self.settle()
        self.control.start_window()

    def decide(self, optimizer: Optimizer) -> None:
        """``on_before_optimizer_step``: gradients are complete. Measure, get the limits, act."""
        self.events.show()  # of an earlier step: what follows from it at the end of its batch is in the same line
        scaling = self._scaling
        if self._pending is not None or scaling.is_active:
            self.settle()
        if self._several_ranks and self.on_device:
            self._replicas.compare()
        if self._manual is not None:
            self._select(self._manual.index(optimizer))
        history, own = self._history, self._history.own
        control, window = own.control, own.window
        control.start_decision()
        if self._unstepped or not self.watch.is_over:
            self._unstepped.discard(history.selected)
            if not self._unstepped and not self.watch.is_over:
                self.watch.end_window()
        if self._manual is not None:
            if not self._manual.has_step(history.selected):
                return
        elif not self._batch_has_loss and (window.is_empty or scaling.is_active):
            own.samples.end_window()
            self._pass_over(optimizer)  # one process: Lightning calls the optimizer without gradients
            return
        own.samples.end_window()
        held, size = window.held, window.size
        unscaled = not scaling.is_active or scaling.unscale(optimizer)
        parameters = own.parameters.read()  # groups may have been added since the last step
        grads = gradients.of(parameters) if unscaled else []
        if self._short_windows is not None:
            self._short_windows.weigh(grads, held, size)
        self._weights = window.weights
        weighs, changed = self._weigh_loss is not None, bool(self.changes.announced)
        # a collective: also called by ranks without a loss
        loss, grad_norm, flags = measure(self.ranks, window, grads, scaling.scale, weighs, changed)
        if not unscaled:
            return
        if loss is None:
            control.pass_over()  # several ranks: the gradients are zeros, not None
            control.restore_nonfinite_buffers()
            scaling.freeze()
            self._pass_over(optimizer)
            return
        if self._several_ranks:
            self._replicas.before_step(history.selected, optimizer, parameters, len(grads))
        attempted = history.counted[history.selected].attempted if self._gradient_observers else 0
        for member in self._gradient_observers:
            member.on_gradients(attempted, parameters)
        if self.changes.expects:
            for plugin, reason in self.changes.expected_at(self.trainer.global_step):
                self._learn_anew(plugin, reason)
        own.lr = self.rewarming.rate(optimizer)
        counters = history.counters
        attempt = Attempt(counters.attempted, own, loss, grad_norm, flags, grads, counters.overflows_in_a_row)
        self._pending = self._decisions.decide(attempt)
        self._attempted += 1

    def _pass_over(self, optimizer: Optimizer) -> None:
        """Count a step for which no rank has a loss. As in Lightning, the global step and schedulers advance."""
        self.window.clear()
        if trainer_internals.skips_backward(self.trainer):
            return
        step, unknown = self.counters.attempted, math.nan
        nothing = Outcome(step, unknown, unknown, unknown, unknown, skipped=True, no_loss=True)
        self._history.add(nothing)
        for recorder in self._recorders:
            recorder.on_attempt(nothing)
        self._history.own.lr = self.rewarming.rate(optimizer)
        self._attempted += 1

    def end_batch(self) -> None:
        """``on_train_batch_end``: rules observe the outcome, requests are executed, metrics are sent."""
        if not (self._batch_has_loss if self._manual is None else self._manual.had_backward):
            self.control.restore_nonfinite_buffers()
            if self._manual is None and not self.window.is_open:
                self.window.clear()  # a batch that is None may end a window, without a step
        self._batch_has_loss = False
        # in device mode the next step settles this one, unless this may be the last batch
        pending = self._pending is not None or self._scaling.is_active
        if pending and (not self.on_device or trainer_internals.may_be_last_batch(self.trainer)):
            self.settle()
        if self._several_ranks and not self.on_device:  # in device mode not all ranks may know the outcome yet
            self._replicas.compare()
        if self._manual is not None:
            self._manual.end_batch(stepped=self._attempted > 0)
            self._select(0)  # between two batches always the first one
        if self._attempted:
            if self._checkers:
                self.check_state()
            due = self.counters.attempted % self._log_every < self._attempted
            self._attempted = 0
            if due or self.trainer.is_last_batch:
                self.flush()
        most, trainer = self._max_attempts, self.trainer
        if most is not None and most <= self.counters.attempted and not 0 < trainer.max_steps <= trainer.global_step:
            steps = f"{self.counters.attempted} steps attempted, {self.counters.applied} applied"
            reason = f"{steps} (config key guard.max_attempts)"
            self._requests.append(Request(RequestKind.STOP, "guard", reason))
        if self._requests:
            requests, self._requests = self._requests, []
            self.flush()
            execute(requests, self.trainer, self.module, self.report, self.rewarm, self.counters.attempted - 1)

    def check_state(self, now: bool = False) -> bool:
        """Whether no plugin finds weights and optimizer state damaged. A collective, if a plugin checks them.

        Args:
            now: the state is about to be stored: check it; False: check it if it is time.
        """
        return not self.is_open or all(each.check_state(now) for each in self._checkers)

    def settle(self, alone: bool = False) -> None:
        """Read the pending outcome and pass it to all members; does nothing if there is none.

        For a dropped step a collective: the ranks tell each other the samples.

        Args:
            alone: not all ranks call it; no collective, and the events name the samples of this rank only.
        """
        if self.is_open and self._scaling.is_active:
            self._scaling.put_back()
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        history = self._history
        self._reports.optimizer = history.names[history.selected]
        outcome = pending()
        if self.on_device and not outcome.applied:
            self.control.freeze_step()
        history.add(outcome, scaled=self._scaling.is_active)
        for recorder in self._recorders:
            recorder.on_attempt(outcome)
        if self._several_ranks and outcome.applied:
            self._replicas.after_step(history.selected)
        if outcome.skipped:
            dropped = self._reports.dropped = DroppedStep(outcome.step, self._history.own.samples.of_step(alone))
        if outcome.no_loss:
            self._reports.missing_loss(outcome, self.ranks.size, weighs=self._weigh_loss is not None)
            return
        if outcome.skipped:
            by = self._decisions.dropped_by(outcome)
            self._history.counters = self.counters.add_drop(by, dropped.samples)
        finite = math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)
        told = not finite and self._reports.nonfinite(outcome)
        several = len(history.each) > 1
        without_loss = outcome._replace(loss=0.0) if several and math.isfinite(outcome.loss) else outcome
        for each in self._rules:
            rule = each.rule
            if not outcome.overflow or rule.sees_overflow:
                seen = without_loss if rule.compares_loss else outcome
                each.state, events, requests = rule.observe(each.state, seen)
                for event in events:
                    if not (told and event.kind == "nonfinite"):  # the guard's event says the same, and what to do
                        self.report(event)
                if requests:
                    self._requests.extend(self._reports.named(request) for request in requests)
        for transform in self._transforms:
            transform.commit(outcome.applied)
        for observer in self._outcome_observers:
            observer.on_outcome(outcome)
        self.events.conclude(outcome)
        self._reports.optimizer = ""
