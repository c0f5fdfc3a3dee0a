"""The decision of a step: the limits of all rules, applied on the host (exact mode) or on the device (device mode)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from stabletrain.core.limits import Limits, join
from stabletrain.core.outcome import Outcome
from stabletrain.runtime import gradients
from stabletrain.runtime.guard import device_limits
from stabletrain.runtime.guard.changes import Changes
from stabletrain.runtime.guard.loss_scaling import LossScaling
from stabletrain.runtime.guard.measurement import common_norm
from stabletrain.runtime.guard.members import RuleMember, TransformMember
from stabletrain.runtime.guard.signals import Signals
from stabletrain.runtime.guard.step_history import OptimizerSteps
from stabletrain.runtime.ranks import Ranks


class Attempt(NamedTuple):
    """A step that is to be decided.

    Args:
        step: number of the attempted step, from 0.
        own: the steps of its optimizer.
        loss: 0-d, unscaled.
        grad_norm: 0-d, of the raw gradients.
        flags: of its `Measurement`.
        grads: complete and unscaled.
        overflows_in_a_row: directly before this step.
    """

    step: int
    own: OptimizerSteps
    loss: Tensor
    grad_norm: Tensor
    flags: list[Tensor | bool]
    grads: list[Tensor]
    overflows_in_a_row: int


class Decisions:
    """Decides the steps of one fit, and acts: drops a step, or scales its gradient.

    Args:
        trainer: in a fit.
        rules: all of them.
        transforms: in the order in which they run.
        changes: those announced and not yet in force.
        announced: called with the reasons when announced changes are in force.
        ranks: of the fit.
        scaling: the loss scaler.
        on_device: whether the optimizer's kernel executes decisions.
    """

    def __init__(
        self,
        trainer: Trainer,
        rules: Sequence[RuleMember],
        transforms: Sequence[TransformMember],
        changes: Changes,
        announced: Callable[[tuple[str, ...]], None],
        ranks: Ranks,
        scaling: LossScaling,
        on_device: bool,
    ) -> None:
        self._trainer, self._on_device = trainer, on_device
        self._members, self._transforms = rules, transforms
        self._rules = [each.rule for each in rules]
        self._changes, self._announced = changes, announced
        self._ranks, self._scaling = ranks, scaling

    def decide(self, attempt: Attempt) -> Callable[[], Outcome]:
        """Decide a step; returns what reads its outcome, to be called before the next step."""
        if self._on_device:
            return self._decide_on_device(attempt)
        outcome = self._decide_exactly(attempt)
        return lambda: outcome

    def dropped_by(self, outcome: Outcome) -> list[str]:
        """The plugins whose limits drop this step; called before their rules observe it."""
        limits = [(each.rule.label, each.rule.limits(each.state)) for each in self._members]
        return [label for label, each in limits if each.skips_step(outcome.loss, outcome.grad_norm)]

    def _decide_exactly(self, attempt: Attempt) -> Outcome:
        """Decide a step on the host, which reads loss and norm."""
        own, control = attempt.own, attempt.own.control
        limits = self._limits()
        loss, norm, changed, no_loss = _read(attempt.loss, attempt.grad_norm, *attempt.flags)
        if changed:
            self._announced(self._changes.take())
            limits = self._limits()
        if self._ranks.size > 1 and not math.isfinite(norm):
            self._scaling.mark_nonfinite(control.optimizer)
        scale, overflow = 1.0, False
        if self._scaling.is_active:
            scale, overflow = self._scaling.scale, self._scaling.found_nonfinite(control.optimizer)
        # a non-finite gradient at a finite loss is an overflow, unless the scale cannot be the cause: the loss scaler
        # drops the step and lowers the scale. It also drops what no rule wants to skip, so NaN is never applied
        due_to_scale = overflow and math.isfinite(loss) and not own.scales.blames_batch(scale)
        skipped = bool(no_loss or limits.skips_step(loss, norm)) and not due_to_scale
        overflow = overflow and not skipped
        transformed = norm
        applied_norm = math.nan
        if skipped:
            control.drop()
            self._scaling.freeze()
        elif overflow:
            control.freeze_step()
        else:
            if self._transforms:
                transformed = self._transform(attempt).item()
            applied_norm = limits.clip(transformed)
            if applied_norm < transformed:
                gradients.scale_(attempt.grads, applied_norm / transformed)
        in_a_row = attempt.overflows_in_a_row + 1 if overflow else 0
        outcome = Outcome(attempt.step, loss, norm, transformed, applied_norm, skipped, overflow, scale, in_a_row)
        return _without_loss(outcome) if no_loss and skipped else outcome

    def _decide_on_device(self, attempt: Attempt) -> Callable[[], Outcome]:
        """Decide a step on the device, without a read by the host."""
        announced = self._changes.take()
        flags = [each for each in attempt.flags if isinstance(each, Tensor)]  # of several ranks
        if announced and not flags:
            self._announced(announced)
        transformed = self._transform(attempt) if self._transforms else attempt.grad_norm
        signals = Signals.of(attempt.loss, attempt.grad_norm, transformed)
        usual = if_changed = self._limits()
        decision = device_limits.decide(usual, *signals)
        if flags:  # only the device knows whether another rank announced a change: it chooses between both limits
            if_changed = self._limits([each.rule.forget(each.state) for each in self._members])
        if if_changed != usual:
            decision = decision.or_if(flags[0] > 0, device_limits.decide(if_changed, *signals))
        if flags:
            decision = decision.or_drop(flags[1] > 0)
        attempt.own.control.decide_on_device(*decision)
        copy, step = signals.start_copy(*flags), attempt.step  # the closure must not keep the gradients in memory

        def outcome() -> Outcome:
            loss, norm, transformed_norm, *read = copy.read()
            changed, no_loss = read or (0.0, 0.0)
            limits = usual
            if changed:
                self._announced(announced)
                limits = if_changed
            skipped = bool(no_loss or limits.skips_step(loss, norm))
            applied_norm = math.nan if skipped else limits.clip(transformed_norm)
            outcome = Outcome(step, loss, norm, transformed_norm, applied_norm, skipped)
            return _without_loss(outcome) if no_loss else outcome

        return outcome

    def _limits(self, states: Sequence[Any] | None = None) -> Limits:
        """The limits of all rules.

        Args:
            states: of the rules; None: their own.
        """
        states = [each.state for each in self._members] if states is None else states
        limits = join([rule.limits(state) for rule, state in zip(self._rules, states, strict=True)])
        # the fallback is for steps that nobody clips
        return limits._replace(fallback=frozenset()) if self._trainer.gradient_clip_val else limits

    def _transform(self, attempt: Attempt) -> Tensor:
        """Run the transforms; the norm of the gradients after them."""
        if attempt.grads:
            own = attempt.own.parameters
            parameters = [p for p in own.read() if p.grad is not None]
            names = own.names(parameters)
            for transform in self._transforms:
                transform.transform(names, parameters, attempt.grads)
        return common_norm(self._ranks, attempt.grads)


def _without_loss(outcome: Outcome) -> Outcome:
    """The outcome of a step whose loss and gradient are of some ranks only."""
    return outcome._replace(loss=math.nan, grad_norm=math.nan, transformed_norm=math.nan, no_loss=True)


def _read(loss: Tensor, grad_norm: Tensor, *flags: Tensor | bool) -> list[float]:
    if loss.is_cpu or loss.device != grad_norm.device:
        return [loss.item(), grad_norm.item(), *map(float, flags)]
    # one device synchronization instead of several
    on_device = [flag.double() for flag in flags if isinstance(flag, Tensor)]
    loss_value, norm, *read = torch.stack([loss.double(), grad_norm.double(), *on_device]).tolist()
    return [loss_value, norm, *(read or map(float, flags))]
