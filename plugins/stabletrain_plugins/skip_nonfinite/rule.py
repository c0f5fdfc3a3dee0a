"""Drop non-finite steps, and request a rollback after too many in a row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from stabletrain.core.events import Event, EventKind, Request, RequestKind
from stabletrain.core.limits import Limits, SkipNonFinite
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule

_FINITE = Limits.of(SkipNonFinite())


class NonFiniteState(NamedTuple):
    """State of the rule.

    Args:
        in_a_row: number of consecutive non-finite steps up to the last step.
    """

    in_a_row: int = 0


@dataclass(frozen=True)
class SkipNonFiniteRule(Rule[NonFiniteState]):
    """Drop a step whose loss or global gradient norm is NaN or infinite, as if its batches had never been seen.

    A single dropped step is harmless. Many in a row mean that the weights are damaged: after ``max_in_a_row`` of them
    the rule requests a rollback; if no plugin can roll back, the run stops cleanly. Overflows of the fp16 loss scaler
    are not counted, unless there are ``max_overflows_in_a_row`` of them or the scale has fallen to ``min_scale``. A
    non-finite gradient that the scale cannot explain, because larger ones went well, is counted, and the scale is held.
    Steps that another plugin skipped do not end the count.

    Args:
        max_in_a_row: non-finite steps in a row after which a rollback is requested, in steps, >= 1.
        max_overflows_in_a_row: fp16 overflows in a row that count as non-finite, in steps, >= 1.
        min_scale: loss scale at or below which an overflow counts as non-finite, > 0; at 1 and below each one does.

    Raises:
        UserError: if an argument is out of range.

    >>> rule = SkipNonFiniteRule()
    >>> rule.limits(rule.init()).skips_step(loss=2.0, grad_norm=float("inf"))
    True
    """

    plugin = "skip_nonfinite"
    slot = "nonfinite"
    sees_overflow = True

    max_in_a_row: int = 10
    max_overflows_in_a_row: int = 50
    min_scale: float = 1.0

    def __post_init__(self) -> None:
        self.require(self.max_in_a_row >= 1, "max_in_a_row", ">= 1")
        self.require(self.max_overflows_in_a_row >= 1, "max_overflows_in_a_row", ">= 1")
        self.require(self.min_scale > 0, "min_scale", "> 0")

    def init(self) -> NonFiniteState:
        """No step dropped yet; the count is 0."""
        return NonFiniteState()

    def forget(self, state: NonFiniteState) -> NonFiniteState:
        """The count continues: a change of the training is no reason for a run of NaN."""
        return state

    def limits(self, state: NonFiniteState) -> Limits:
        """Drop the next step if it is not finite."""
        return _FINITE

    def observe(self, state: NonFiniteState, outcome: Outcome) -> Observation[NonFiniteState]:
        """Count non-finite steps in a row; only an applied step resets the count."""
        if outcome.overflow:
            return self._observe_overflow(state, outcome)
        if math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm):
            return Observation(NonFiniteState() if outcome.applied and state.in_a_row else state)
        value = outcome.grad_norm if math.isfinite(outcome.loss) else outcome.loss
        reason = f"loss {outcome.loss:.6g}, grad_norm {outcome.grad_norm:.6g}: step skipped"
        return self._count(state, outcome, "nonfinite", value, math.nan, reason)

    def _observe_overflow(self, state: NonFiniteState, outcome: Outcome) -> Observation[NonFiniteState]:
        if outcome.overflows_in_a_row >= self.max_overflows_in_a_row:
            value, limit = float(outcome.overflows_in_a_row), float(self.max_overflows_in_a_row)
            reason = f"{outcome.overflows_in_a_row} fp16 overflows in a row (loss scale {outcome.loss_scale:.6g})"
        elif outcome.loss_scale <= self.min_scale:
            value, limit = outcome.loss_scale, self.min_scale
            reason = f"fp16 overflow at a loss scale of {outcome.loss_scale:.6g}"
        else:
            return Observation(state)
        return self._count(state, outcome, "overflow", value, limit, reason)

    def _count(
        self, state: NonFiniteState, outcome: Outcome, kind: EventKind, value: float, limit: float, reason: str
    ) -> Observation[NonFiniteState]:
        in_a_row = state.in_a_row + 1
        event = Event(outcome.step, self.label, kind, value, limit, f"{reason} ({in_a_row} in a row)")
        if in_a_row < self.max_in_a_row:
            return Observation(NonFiniteState(in_a_row), (event,))
        request = (
            f"{in_a_row} non-finite steps in a row (plugins.nonfinite.max_in_a_row={self.max_in_a_row}); last: {reason}"
        )
        return Observation(NonFiniteState(), (event,), (Request(RequestKind.ROLLBACK, self.label, request),))
