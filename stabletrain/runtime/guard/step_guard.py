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

docs/architecture.md shows where in Lightning's loop each method is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.limits import Limits, join
from stabletrain.core.loss_scale import ScaleHistory
from stabletrain.core.outcome import Outcome
from stabletrain.core.state import from_plain, to_plain
from stabletrain.runtime import gradients
from stabletrain.runtime.accumulation import AccumulationWindow
from stabletrain.runtime.guard import device_limits, dropped_steps, publishing, support
from stabletrain.runtime.guard.changes import Changes
from stabletrain.runtime.guard.dropped_steps import DroppedStep, StepSamples
from stabletrain.runtime.guard.loss_scaling import LossScaling
from stabletrain.runtime.guard.manual_steps import ManualSteps
from stabletrain.runtime.guard.members import Member, RuleMember, TransformMember
from stabletrain.runtime.guard.metrics import Counters, MetricsWindow
from stabletrain.runtime.guard.missing_loss import MissingLosses
from stabletrain.runtime.guard.per_optimizer import PerOptimizer
from stabletrain.runtime.guard.replica_check import ReplicaCheck
from stabletrain.runtime.guard.requests import execute
from stabletrain.runtime.guard.rewarming import Rewarming
from stabletrain.runtime.guard.short_windows import ShortWindows
from stabletrain.runtime.guard.signals import Signals
from stabletrain.runtime.guard.step_checks import BackwardWatch
from stabletrain.runtime.guard.step_control import StepControl
from stabletrain.runtime.guard.strategy_checks import check_accumulation
from stabletrain.runtime.guard.support import DecisionMode
from stabletrain.runtime.guard.trained_parameters import TrainedParameters
from stabletrain.runtime.hidden.hidden_state import HiddenState
from stabletrain.runtime.internals import manual as manual_internals
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.ranks import Ranks
from stabletrain.runtime.records import run_files
from stabletrain.runtime.records.event_log import EventLog, say_end
from stabletrain.settings import worded

_PER_OPTIMIZER = ("window", "metrics", "parameters", "_of_optimizer", "_scales", "_lr", "_samples", "_control")
"""The attributes of the guard of which each optimizer has its own."""
_PROGRESS_BAR = {"loss": "loss", "grad_norm": "grad_norm", "clipped": "clipped_share", "skipped": "skipped"}
"""Words in the progress bar, and the metrics that they show."""


class StepGuard:
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
        self.trainer = trainer
        self.module = module
        self.members = list(members)
        self.mode = mode
        self.counters = Counters()
        self.changes = Changes()
        self.rewarming = Rewarming(trainer)
        self._told_of_nonfinite = False
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir is a collective: called on every rank
        path = events or Path(folder) / run_files.EVENTS
        quiet = not trainer.is_global_zero or trainer_internals.is_fast_dev_run(trainer)
        self.events = EventLog(None if quiet else path, log_warnings=trainer.is_global_zero)
        self._max_attempts = max_attempts or (2 * trainer.max_steps if trainer.max_steps > 0 else None)
        self._active = support.active_members(trainer, members)
        self._rules = [cast(RuleMember, m) for m in self._active if m.sets_limits]
        # transforms do not commute: they run in the order of their names, whatever the order of the list
        transforms = [cast(TransformMember, m) for m in self._active if m.transforms_gradients]
        self._transforms = sorted(transforms, key=lambda m: (m.plugin, m.state_key))
        self._gradient_observers = [m for m in self._active if m.observes_gradients]
        self._outcome_observers = [m for m in self._active if m.observes_outcomes]
        self._recorders = [m for m in self._active if m.records_attempts]
        self.window = AccumulationWindow(trainer)
        weighs = weigh_windows and module.automatic_optimization  # by hand, the module divides the losses
        self._short_windows = ShortWindows(trainer.is_global_zero) if weighs else None
        self._weights: list[float] = []
        self._weigh_loss = weigh_loss if module.automatic_optimization else None
        self._batch_has_loss = False
        self._manual: ManualSteps | None = None
        self._optimizer_name = ""
        """While an outcome is passed on: the name of its optimizer, if there are several."""
        self._optimizers = PerOptimizer(self, _PER_OPTIMIZER, self._start_optimizer)
        self._start_optimizer()
        self._pending: Callable[[], Outcome] | None = None
        self._requests: list[Request] = []
        self._dropped: DroppedStep | None = None
        self._attempted = 0
        """Steps that were decided in the batch in progress."""
        self.is_open = False
        self._has_begun = False
        self.is_training = False
        """As ``is_open``, but only until the training loop has ended."""
        self._control: StepControl | None = None
        self._undo: list[Callable[[], None]] = []

    # ---- the fit ----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """``on_fit_start``: the optimizer exists. Choose the mode, and wrap the optimizer's step."""
        for member in self.members:
            member.on_optimizer_ready(self.trainer)
        support.check_optimizer(self.trainer)
        self._scaling = LossScaling(self.trainer)
        self.ranks = Ranks(self.trainer)
        self._common_on = self.ranks.device if self.ranks.size > 1 else None
        self._replicas = ReplicaCheck(self.trainer, self.module, self.ranks)
        self._replicas.open(self.trainer.optimizers)
        self._missing_losses = MissingLosses(self.trainer, self.module)
        self._has_begun = False
        self._undo = [trainer_internals.before_checkpoint(self.trainer, self._before_checkpoint)]
        self._undo.append(self._missing_losses.undo)
        if self.module.automatic_optimization:
            self._optimizers.restart(1)
            self._control_steps(StepControl(self.trainer, self.module, self.rewarming, self.ranks))
        else:
            self._control_manual_steps()
        for member in self.members:
            member.use_optimizers([""] if self._manual is None else self._manual.names)
        device = self.parameters.read(self.trainer.global_step)[0].device
        self.on_device = support.decides_on_device(self.trainer, self.module, self.mode, device)
        self.watch = BackwardWatch(self.module, self.trainer.optimizers)
        self._unstepped = set(self._optimizers)
        self._log_every = trainer_internals.log_interval(self.trainer)
        self.is_open = self.is_training = True

    def _start_optimizer(self) -> None:
        """What is known of an optimizer before its first step."""
        self.metrics = MetricsWindow()
        self._of_optimizer = Counters()
        self._scales = ScaleHistory()
        self._lr: float | Tensor = math.nan

    def _control_steps(self, control: StepControl) -> None:
        """Control the steps of one optimizer."""
        self._control = control
        self._samples = StepSamples(self.trainer, self.ranks)
        self._undo.append(control.undo)
        self.parameters = TrainedParameters(control.optimizer, self.module)

    def _control_manual_steps(self) -> None:
        """Control the steps of all optimizers, which the module makes by hand."""
        manual = self._manual = ManualSteps(self.trainer, self.module, self.ranks)
        self._optimizers.restart(len(manual.optimizers))
        hidden = HiddenState(self.module)
        for i in self._optimizers:
            own = (manual.optimizers[i], manual.buffers[i], hidden)
            self._control_steps(
                StepControl(
                    self.trainer, self.module, self.rewarming, self.ranks, *own, undecided=manual.refuse_undecided
                )
            )
            self.window = manual.windows[i]
        self._undo.append(manual_internals.after_manual_step(self.trainer, self._after_manual_step))
        self._undo.append(manual_internals.before_zero_grad(self.trainer, manual.remove))

    def close(self) -> None:
        """``teardown`` and ``on_exception``: restore everything that was replaced; a second call does nothing."""
        self.is_open = self.is_training = False
        self.events.show()
        while self._undo:
            self._undo.pop()()
        for _ in self._optimizers:
            self.window.clear()
        self._pending = None

    # ---- one step ---------------------------------------------------------------------------------------------------

    def end_epoch(self) -> None:
        """``on_train_epoch_end``: forget a window that was not finished, after ``on_train_batch_start`` returned -1."""
        if self._manual is None:  # by hand, gradients may be accumulated over the end of an epoch
            self.window.clear()
            self._samples.clear()

    def start_batch(self) -> None:
        """``on_train_batch_start``: copy the buffers before the first micro-batch of a window."""
        if not self._has_begun:
            self._has_begun = True
            check_accumulation(self.trainer)  # plans of windows need the train loader
            self._replicas.begin()  # strategies that shard load the weights after `open`
        if self._manual is not None:
            for i in self._optimizers:
                if not self._manual.windows[i].may_be_open:
                    self._start_window()
        elif not self.window.is_started and self._control is not None:
            self.window.is_started = True
            self._start_window()

    def _start_window(self) -> None:
        self.parameters.put_back(self.trainer.global_step)
        self.control.start_window()

    def take_loss(self, loss: Tensor) -> None:
        """``on_before_backward``: store a micro-batch's loss, divided by the window's size, times the loss scale."""
        self.watch.before_backward()
        if self._manual is not None:
            self._manual.before_backward(loss)
            return
        self._batch_has_loss = True
        missing = self._missing_losses.take()
        if missing is None:
            if self._weigh_loss is not None:
                self.window.weights.append(self._weigh_loss(loss))
            self.window.add(loss if self._weigh_loss is None or self.window.weights[-1] else torch.zeros_like(loss))
        else:
            self.window.add_without_loss(drop=missing == "drop")
        self._samples.add_batch()

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
                self._samples.add_batch()

    def _select(self, index: int) -> None:
        """Select an optimizer, with the histories of all members."""
        self._optimizers.select(index)
        for member in self.members:
            member.select_optimizer(index)

    def _after_manual_step(self) -> None:
        """The module has stepped an optimizer by hand: its outcome is history before the next backward pass."""
        self.settle()
        self.control.start_window()

    def decide(self, optimizer: Optimizer) -> None:
        """``on_before_optimizer_step``: gradients are complete. Measure, get the limits, act."""
        self.events.show()  # of an earlier step: what follows from it at the end of its batch is in the same line
        self.settle()
        if self.on_device:
            self._replicas.compare()
        if self._manual is not None:
            self._select(self._manual.index(optimizer))
        self.control.start_decision()
        self._unstepped.discard(self._optimizers.selected)
        if not self._unstepped and not self.watch.is_over:
            self.watch.end_window()
        if self._manual is not None:
            if not self._manual.has_step(self._optimizers.selected):
                return
        elif not self._batch_has_loss and (self.window.is_empty or self._scaling.is_active):
            self._samples.end_window()
            self._pass_over(optimizer)  # one process: Lightning calls the optimizer without gradients
            return
        self._samples.end_window()
        held, size = self.window.held, self.window.size
        loss, weight, flags = self._window_loss()  # a collective: also called by ranks without a loss
        if not self._scaling.unscale(optimizer):
            return
        if loss is None:
            self.control.pass_over()  # several ranks: the gradients are zeros, not None
            self.control.restore_nonfinite_buffers()
            self._scaling.freeze()
            self._pass_over(optimizer)
            return
        parameters = self.parameters.read(self.trainer.global_step)  # groups may have been added since the last step
        grads = gradients.of(parameters)
        self._replicas.before_step(self._optimizers.selected, optimizer, parameters, len(grads))
        if weight is not None:
            gradients.scale_(grads, self.ranks.size * size / weight)
        elif self._short_windows is not None:
            self._short_windows.weigh(grads, held, size)
        grad_norm = gradients.global_norm(grads, self._common_on)
        for member in self._gradient_observers:
            member.on_gradients(self._counted.attempted, parameters)
        for plugin, reason in self.changes.expected_at(self.trainer.global_step):
            self._learn_anew(plugin, reason)
        self._lr = self.rewarming.rate(optimizer)
        decide = self._decide_on_device if self.on_device else self._decide_exactly
        self._pending = decide(loss, grad_norm, grads, *flags)
        self._attempted += 1

    def _pass_over(self, optimizer: Optimizer) -> None:
        """Count a step for which no rank has a loss. As in Lightning, the global step and schedulers advance."""
        self.window.clear()
        if trainer_internals.skips_backward(self.trainer):
            return
        step, unknown = self.counters.attempted, math.nan
        nothing = Outcome(step, unknown, unknown, unknown, unknown, skipped=True, no_loss=True)
        self.counters = self.counters.add(nothing)
        self.metrics.add(nothing)
        for recorder in self._recorders:
            recorder.on_attempt(nothing)
        self._lr = self.rewarming.rate(optimizer)
        self._attempted += 1

    def end_batch(self) -> None:
        """``on_train_batch_end``: rules observe the outcome, requests are executed, metrics are sent."""
        if not (self._batch_has_loss if self._manual is None else self._manual.had_backward):
            self.control.restore_nonfinite_buffers()
            if self._manual is None and not self.window.is_open:
                self.window.clear()  # a batch that is None may end a window, without a step
        self._batch_has_loss = False
        # in device mode the next step settles this one, unless this may be the last batch
        if not self.on_device or trainer_internals.may_be_last_batch(self.trainer):
            self.settle()
        if not self.on_device:  # in device mode not all ranks may know the outcome yet
            self._replicas.compare()
        if self._manual is not None:
            self._manual.end_batch(stepped=self._attempted > 0)
            self._select(0)  # between two batches always the first one
        if self._attempted:
            due = self.counters.attempted % self._log_every < self._attempted
            self._attempted = 0
            if due or self.trainer.is_last_batch:
                self.flush()
        if self._max_attempts is not None and self._max_attempts <= self.counters.attempted and not self._complete:
            steps = f"{self.counters.attempted} steps attempted, {self.counters.applied} applied"
            reason = f"{steps} (config key guard.max_attempts)"
            self._requests.append(Request(RequestKind.STOP, "guard", reason))
        if self._requests:
            requests, self._requests = self._requests, []
            self.flush()
            execute(requests, self.trainer, self.module, self.report, self.rewarm, self.counters.attempted - 1)

    def settle(self, alone: bool = False) -> None:
        """Read the pending outcome and pass it to all members; does nothing if there is none.

        For a dropped step a collective: the ranks tell each other the samples.

        Args:
            alone: not all ranks call it; no collective, and the events name the samples of this rank only.
        """
        if self.is_open:
            self._scaling.put_back()
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._optimizer_name = self._manual.names[self._optimizers.selected] if self._manual is not None else ""
        outcome = pending()
        if self.on_device and not outcome.applied:
            self.control.freeze_step()
        if self._scaling.is_active:
            self._scales = self._scales.add(outcome)
        self.counters, self._of_optimizer = self.counters.add(outcome), self._of_optimizer.add(outcome)
        self.metrics.add(outcome)
        for recorder in self._recorders:
            recorder.on_attempt(outcome)
        if outcome.applied:
            self._replicas.after_step(self._optimizers.selected)
        if outcome.no_loss:
            self._report_missing_loss(outcome, alone)
            return
        if outcome.skipped:
            self._count_drop(outcome, alone)
        several = self._manual is not None and len(self._manual.optimizers) > 1
        told = self._tell_of_nonfinite(outcome)
        without_loss = outcome._replace(loss=0.0) if several and math.isfinite(outcome.loss) else outcome
        for each in self._rules:
            if not outcome.overflow or each.rule.sees_overflow:
                observation = each.rule.observe(each.state, without_loss if each.rule.compares_loss else outcome)
                each.state = observation.state
                for event in observation.events:
                    if not (told and event.kind == "nonfinite"):  # the guard's event says the same, and what to do
                        self.report(event)
                self._requests.extend(self._named(request) for request in observation.requests)
        for transform in self._transforms:
            transform.commit(outcome.applied)
        for observer in self._outcome_observers:
            observer.on_outcome(outcome)
        self.events.conclude(outcome)
        self._optimizer_name = ""

    @property
    def _counted(self) -> Counters:
        """The steps of the run; with manual optimization, those of the selected optimizer."""
        return self.counters if self._manual is None else self._of_optimizer

    def _named(self, request: Request) -> Request:
        """A request that says of which optimizer it is, if there are several."""
        name = self._optimizer_name
        return request._replace(reason=f"{name}: {request.reason}") if name else request

    def _count_drop(self, outcome: Outcome, alone: bool) -> None:
        """Before the rules observe it: their limits are still those that dropped the step."""
        self._dropped = DroppedStep(outcome.step, self._samples.of_step(alone))
        rules = [each.rule for each in self._rules]
        limits = [each.rule.limits(each.state) for each in self._rules]
        plugins = [r.label for r, each in zip(rules, limits, strict=True) if _drops(each, outcome)]
        self.counters = self.counters.add_drop(plugins, self._dropped.samples)

    def _report_missing_loss(self, outcome: Outcome, alone: bool) -> None:
        self._dropped = DroppedStep(outcome.step, self._samples.of_step(alone))
        reason = f"training_step gave no loss on one of {self.ranks.size} ranks or more: step skipped"
        if self._weigh_loss is not None:
            lacking = f", or {reason.removesuffix(': step skipped')}" if self.ranks.size > 1 else ""
            reason = f"every micro-batch of the step has a count of 0{lacking}: step skipped"
        self.report(Event(outcome.step, "guard", "skip", float(self.counters.without_loss), math.nan, reason))

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

    def rewarm(self, request: Request) -> None:
        """Let the learning rate climb again from the next step on, over ``request.steps`` applied steps."""
        self.settle()  # a step in flight may have been dropped
        first = self.rewarming.start(request.steps)
        reason = f"learning rate climbs over {request.steps} steps from step {first}: {request.reason}"
        steps, attempted = float(request.steps), self.counters.attempted - 1
        self.report(Event(attempted, request.plugin, "rewarm", steps, math.nan, reason))

    def state_dict(self) -> dict[str, Any]:
        """The guard's own state, in plain Python types; an outcome in flight is observed first."""
        self.settle(alone=True)  # a checkpoint may be saved by one rank
        own = {
            "rewarm": self.rewarming.state(),
            "scales": to_plain(self._scales),
            "announced": list(self.changes.announced),
            "passed": self.changes.passed,
        }
        if self._manual is not None:
            own["optimizers"] = [
                {"counters": self._of_optimizer._asdict(), "scales": to_plain(self._scales)} for _ in self._optimizers
            ]
        return {"counters": self.counters._asdict(), "guard": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; what is missing stays as it is."""
        if "counters" in state:
            self.counters = from_plain(Counters, {**Counters()._asdict(), **state["counters"]})
        if "guard" in state:
            self.rewarming.load(state["guard"]["rewarm"])
            self._scales = from_plain(ScaleHistory, state["guard"]["scales"])
            self.changes.announced = from_plain(tuple[str, ...], state["guard"]["announced"])
            self.changes.passed = from_plain(dict[str, int], state["guard"].get("passed", {}))
            saved = state["guard"].get("optimizers", [])
            if not self.is_open:
                self._optimizers.grow(len(saved))
            for i in self._optimizers:
                if i < len(saved):
                    self._of_optimizer = from_plain(Counters, {**Counters()._asdict(), **saved[i]["counters"]})
                    self._scales = from_plain(ScaleHistory, saved[i]["scales"])

    def drop_requests(self) -> None:
        """Drop the requests that are not executed yet: something else has answered them."""
        self._requests.clear()

    def after_restore(self, state: Mapping[str, Any]) -> None:
        """After the state of an earlier step was restored: restore the guard's, drop pending losses and requests.

        The counts of steps are not restored.

        Args:
            state: what `state_dict` returned at that step; may be empty.
        """
        self.changes.passed = {}  # positions are passed again
        in_a_row = state.get("counters", {}).get("overflows_in_a_row", 0)
        counted = [self._of_optimizer for _ in self._optimizers]
        self.load_state_dict({**state, "counters": {**self.counters._asdict(), "overflows_in_a_row": in_a_row}})
        for i in self._optimizers:
            self._of_optimizer = counted[i]
        for _ in self._optimizers:
            self.window.clear()
            self._samples.clear()
        if self._manual is not None:
            self._manual.clear()
        self._requests.clear()

    @property
    def all_parameters(self) -> list[TrainedParameters]:
        """Those of each optimizer."""
        return [self.parameters for _ in self._optimizers]

    @property
    def _complete(self) -> bool:
        return 0 < self.trainer.max_steps <= self.trainer.global_step

    @property
    def control(self) -> StepControl:
        """The step control of this fit."""
        assert self._control is not None, "the guard acts only after on_fit_start"
        return self._control

    def _window_loss(self) -> tuple[Tensor | None, float | Tensor | None, list[Tensor | bool]]:
        """The unscaled mean loss of the window over all ranks; the sum of the weights, None if there are none, else not
        0; was a change announced, and has the step to be dropped, because a loss is missing or all weights are 0?
        """
        flags: list[Any] = [bool(self.changes.announced), self.window.lacks_loss]
        weights, factor = self.window.weights, self.window.size / self._scaling.scale
        self._weights = weights
        if self._weigh_loss is None:
            loss, flags = self.ranks.mean_loss(self.window.take(), *flags)
            return loss if loss is None or factor == 1.0 else loss * factor, None, flags
        loss, weight, flags = self.ranks.weighted_mean_loss(self.window.take(), math.fsum(weights), *flags)
        if isinstance(weight, Tensor):
            flags[1] = flags[1] + (weight == 0)
            weight = weight.masked_fill(weight == 0, 1.0)
        elif loss is not None and weight == 0:
            flags, weight = [torch.full((), float(each), device=loss.device) for each in (flags[0], True)], 1.0
        return loss if loss is None else loss * factor, weight, flags

    def _limits(self, states: Sequence[Any] | None = None) -> Limits:
        """The limits of all rules.

        Args:
            states: of the rules; None: their own.
        """
        states = [each.state for each in self._rules] if states is None else states
        limits = join([each.rule.limits(state) for each, state in zip(self._rules, states, strict=True)])
        # the fallback is for steps that nobody clips
        return limits._replace(fallback=frozenset()) if self.trainer.gradient_clip_val else limits

    def _decide_exactly(
        self, loss: Tensor, grad_norm: Tensor, grads: list[Tensor], *flags: Tensor | bool
    ) -> Callable[[], Outcome]:
        limits = self._limits()
        loss_value, norm, changed, no_loss = _read(loss, grad_norm, *flags)
        if changed:
            self._apply_announced(self.changes.take())
            limits = self._limits()
        if self.ranks.size > 1 and not math.isfinite(norm):
            self._scaling.mark_nonfinite(self.control.optimizer)
        scale, overflow = self._scaling.scale, self._scaling.found_nonfinite(self.control.optimizer)
        # a non-finite gradient at a finite loss is an overflow, unless the scale cannot be the cause: the loss scaler
        # drops the step and lowers the scale. It also drops what no rule wants to skip, so NaN is never applied
        due_to_scale = overflow and math.isfinite(loss_value) and not self._scales.blames_batch(scale)
        skipped = bool(no_loss or limits.skips_step(loss_value, norm)) and not due_to_scale
        overflow = overflow and not skipped
        transformed = norm
        applied_norm = math.nan
        if skipped:
            self.control.drop()
            self._scaling.freeze()
        elif overflow:
            self.control.freeze_step()
        else:
            if self._transforms:
                transformed = self._transform(grads).item()
            applied_norm = limits.clip(transformed)
            if applied_norm < transformed:
                gradients.scale_(grads, applied_norm / transformed)
        in_a_row = self.counters.overflows_in_a_row + 1 if overflow else 0
        step = self.counters.attempted
        outcome = Outcome(step, loss_value, norm, transformed, applied_norm, skipped, overflow, scale, in_a_row)
        if no_loss and skipped:
            outcome = _without_loss(outcome)
        return lambda: outcome

    def _decide_on_device(
        self, loss: Tensor, grad_norm: Tensor, grads: list[Tensor], *flags: Tensor | bool
    ) -> Callable[[], Outcome]:
        announced = self.changes.take()
        on_device = [flag for flag in flags if isinstance(flag, Tensor)]  # of several ranks
        if announced and not on_device:
            self._apply_announced(announced)
        transformed = self._transform(grads) if self._transforms else grad_norm
        signals = Signals(loss, grad_norm, transformed)
        usual = if_changed = self._limits()
        decision = device_limits.decide(usual, *signals)
        if on_device:  # only the device knows whether another rank announced a change: it chooses between both limits
            if_changed = self._limits([each.rule.forget(each.state) for each in self._rules])
        if if_changed != usual:
            decision = decision.or_if(on_device[0] > 0, device_limits.decide(if_changed, *signals))
        if on_device:
            decision = decision.or_drop(on_device[1] > 0)
        self.control.decide_on_device(*decision)
        copy, step = signals.start_copy(*on_device), self.counters.attempted

        def outcome() -> Outcome:
            loss_value, norm, transformed_norm, *read = copy.read()
            changed, no_loss = read or (0.0, 0.0)
            limits = usual
            if changed:
                self._apply_announced(announced)
                limits = if_changed
            skipped = bool(no_loss or limits.skips_step(loss_value, norm))
            applied_norm = math.nan if skipped else limits.clip(transformed_norm)
            outcome = Outcome(step, loss_value, norm, transformed_norm, applied_norm, skipped)
            return _without_loss(outcome) if no_loss else outcome

        return outcome

    def _before_checkpoint(self) -> None:
        """Observe the outcome in flight, and learn anew if any rank announced a change since the last decision."""
        # after an exception of one rank the others do not get here
        together = self.trainer.state.status == "running"
        self.settle(alone=not together)
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

    def _transform(self, grads: list[Tensor]) -> Tensor:
        if grads:
            parameters = [p for p in self.parameters.read(self.trainer.global_step) if p.grad is not None]
            names = self.parameters.names(parameters)
            for transform in self._transforms:
                transform.transform(names, parameters, grads)
        return gradients.global_norm(grads, self._common_on)

    # ---- records ----------------------------------------------------------------------------------------------------

    def _tell_of_nonfinite(self, outcome: Outcome) -> bool:
        """Report, once in a fit, that a non-finite step was applied because no plugin drops such steps."""
        loss, norm = outcome.loss, outcome.grad_norm
        if self._told_of_nonfinite or not outcome.applied or (math.isfinite(loss) and math.isfinite(norm)):
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

    def report(self, event: Event) -> None:
        """Write an event to the log, then pass it to every callback with ``on_stability_event`` (see `hooks`)."""
        if self._dropped is not None:
            event = self._dropped.describe(event)
        event = event._replace(reason=worded(event.reason))
        if name := self._optimizer_name:
            event = event._replace(optimizer=name, reason=f"{name}: {event.reason}")
        self.events.append(event)
        if event.kind == "rollback":
            self.counters = self.counters._replace(rollbacks=self.counters.rollbacks + 1)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            listen: Any = getattr(callback, "on_stability_event", None)
            if listen is not None:
                listen(self.trainer, self.module, event)

    def say_end(self) -> None:
        """Called when the fit ends, for whatever reason: one line about its steps, a warning if many were dropped."""
        if not self.trainer.is_global_zero:
            return
        self.events.show()
        keys = {each.rule.label: f"plugins.{each.rule.slot}" for each in self._rules}
        warning = dropped_steps.warning(self.counters, keys)
        say_end(dropped_steps.summary(self.counters, self.events.path if self.events.counts else None), warning)

    def flush(self) -> None:
        """Send the metrics since the last flush to the loggers, the progress bar and ``callback_metrics``."""
        metrics: dict[str, float] = {}
        shown: dict[str, float] = {}
        for i in self._optimizers:
            taken = self.metrics.take(self._counted)
            if taken:
                taken |= self._scaling.metrics(self._counted)
                taken["lr"] = float(self._lr)
            suffix = f"/{self._manual.names[i]}" if self._manual is not None and self._manual.names[i] else ""
            metrics |= {f"{name}{suffix}": value for name, value in taken.items()}
            shown |= {f"{word}{suffix}": taken[name] for word, name in _PROGRESS_BAR.items() if name in taken}
        if metrics and len(self._optimizers) > 1:  # of all optimizers together
            metrics |= {"skipped": float(self.counters.skipped), **self._scaling.metrics(self.counters)}
        for member in self._active:
            metrics.update(member.metrics())
        if metrics:
            publishing.publish(self.trainer, metrics, shown)


def _drops(limits: Limits, outcome: Outcome) -> bool:
    return limits.skips_step(outcome.loss, outcome.grad_norm)


def _without_loss(outcome: Outcome) -> Outcome:
    """The outcome of a step whose loss and gradient are of some ranks only."""
    return outcome._replace(loss=math.nan, grad_norm=math.nan, transformed_norm=math.nan, no_loss=True)


def _read(loss: Tensor, grad_norm: Tensor, *flags: Tensor | bool) -> list[float]:
    if loss.device.type == "cpu" or loss.device != grad_norm.device:
        return [loss.item(), grad_norm.item(), *map(float, flags)]
    # one device synchronization instead of several
    on_device = [flag.double() for flag in flags if isinstance(flag, Tensor)]
    loss_value, norm, *read = torch.stack([loss.double(), grad_norm.double(), *on_device]).tolist()
    return [loss_value, norm, *(read or map(float, flags))]
