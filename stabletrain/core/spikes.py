"""The detector behind ``plugins/spike``: what is a spike, what a divergence, what a new level, what is no number.

It lies in the core because the slot's plugins, which only watch or also roll back, must come to the same verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from stabletrain.core.baseline import Baseline, OutlierTest
from stabletrain.core.events import Event, EventKind, Request, RequestKind
from stabletrain.core.limits import NO_LIMITS, Limits
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule


class Excursion(NamedTuple):
    """A signal's time away from its baseline.

    Args:
        steps: finite steps since it left, the last one included; 0: it is inside.
        values: its last values out there, at most a window of them.
    """

    steps: int = 0
    values: tuple[float, ...] = ()


_INSIDE = Excursion()


class SpikeState(NamedTuple):
    """What the detector remembers.

    Args:
        loss: baseline of the loss.
        norm: baseline of the gradient norm.
        loss_out: the loss's present excursion.
        norm_out: the norm's present excursion, the loss being inside.
        nonfinite: length of the present run of non-finite steps.
        seen: steps observed so far, fp16 overflows left out.
        flagged: numbers, counted as in ``seen``, of the flagged steps among the last ``score_window``.
    """

    loss: Baseline = Baseline()
    norm: Baseline = Baseline()
    loss_out: Excursion = _INSIDE
    norm_out: Excursion = _INSIDE
    nonfinite: int = 0
    seen: int = 0
    flagged: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SpikeDetection(Rule[SpikeState]):
    """Base of the rules that tell spike, divergence, new level and non-finite step apart; it limits nothing.

    Loss and raw gradient norm are judged against median and MAD of a delayed window that holds accepted steps only:
    applied, finite, and with both signals inside. A signal leaves its baseline at an outlier and is back below the
    middle between centre and limit. See `stabletrain_plugins.detect_spikes.rule.DetectSpikesRule` for the arguments.
    """

    z_threshold: float = 6.0
    window: int = 128
    delay: int = 32
    min_samples: int = 64
    patience: int = 20
    regime_after: int = 20
    min_sigma_norm: float = 0.05
    min_sigma_loss: float = 0.02
    score_window: int = 10_000

    def __post_init__(self) -> None:
        self.require(0 < self.z_threshold < math.inf, "z_threshold", "> 0 and finite")
        self.require(self.window >= 2, "window", ">= 2")
        self.require(self.delay >= 0, "delay", ">= 0")
        self.require(2 <= self.min_samples <= self.window, "min_samples", f"from 2 to window={self.window}")
        self.require(1 <= self.patience <= self.window, "patience", f"from 1 to window={self.window}")
        self.require(2 <= self.regime_after <= self.window, "regime_after", f"from 2 to window={self.window}")
        self.require(0 < self.min_sigma_norm < math.inf, "min_sigma_norm", "> 0 and finite")
        self.require(0 <= self.min_sigma_loss < math.inf, "min_sigma_loss", ">= 0 and finite")
        self.require(self.score_window >= 1, "score_window", ">= 1")

    def init(self) -> SpikeState:
        """Nothing is known yet."""
        return SpikeState()

    def limits(self, state: SpikeState) -> Limits:
        """None: the detector only watches."""
        return NO_LIMITS

    def readings(self, state: SpikeState) -> dict[str, float]:
        """``spike_score``: share of flagged steps among the last ``score_window``."""
        steps = min(state.seen, self.score_window)
        return {"spike_score": len(state.flagged) / steps} if steps else {}

    def observe(self, state: SpikeState, outcome: Outcome) -> Observation[SpikeState]:
        """Judge a step, and learn it where nothing is wrong with it."""
        if outcome.overflow:
            return Observation(state)
        loss, norm = outcome.loss, outcome.grad_norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._nonfinite(state, outcome)
        by_loss, by_norm = self._loss.is_outlier(state.loss, loss), self._norm.is_outlier(state.norm, norm)
        state = self._counted(state, by_loss or by_norm, nonfinite=0)
        if by_loss or (state.loss_out.steps and self._loss.is_raised(state.loss, loss)):
            return self._away(state, outcome, by_loss, by_norm)
        if by_norm or (state.norm_out.steps and self._norm.is_raised(state.norm, norm)):
            return self._shifted(state, outcome, by_norm)
        losses, norms = state.loss, state.norm
        if outcome.applied:
            losses, norms = self._loss.learn(losses, loss), self._norm.learn(norms, norm)
        return Observation(SpikeState(losses, norms, seen=state.seen, flagged=state.flagged))

    def rebase(self, state: SpikeState, cause: str) -> SpikeState:
        """The baselines at the snapshot; whatever was going on is over."""
        return state._replace(loss_out=_INSIDE, norm_out=_INSIDE, nonfinite=0)

    def asks(self) -> bool:
        """Whether a divergence becomes a request for a rollback."""
        return True

    # ---- verdicts ---------------------------------------------------------------------------------------------------

    def _away(self, state: SpikeState, outcome: Outcome, by_loss: bool, by_norm: bool) -> Observation[SpikeState]:
        """The loss is outside: a spike if it comes back within ``patience`` steps, else a divergence."""
        out = self._further(state.loss_out, outcome.loss)
        state = state._replace(loss_out=out, norm_out=_INSIDE)
        loss, limit = outcome.loss, self._loss.limit(state.loss)
        reason = self._sentence("loss", loss, self._loss, state.loss, by_loss)
        events: tuple[Event, ...] = ()
        requests: tuple[Request, ...] = ()
        if out.steps % self.patience == 0:
            reason = f"{reason}, not back within {out.steps} steps (plugins.spike.patience={self.patience})"
            events = (self._event(outcome, "divergence", loss, limit, reason),)
            requests = self._demand(reason)
        elif by_loss and out.steps < self.patience:
            events = (self._event(outcome, "spike", loss, limit, f"{reason}, step {out.steps} outside"),)
        elif by_norm and out.steps < self.patience:
            reason = self._sentence("grad_norm", outcome.grad_norm, self._norm, state.norm, True)
            value, limit = outcome.grad_norm, self._norm.limit(state.norm)
            events = (self._event(outcome, "spike", value, limit, f"{reason}, step {out.steps} outside"),)
        if out.steps >= self.window:
            was = self._loss.centre(state.loss)
            level = self._loss.relearn(state.loss, out.values)
            state = state._replace(loss=level, loss_out=_INSIDE)
            now = self._loss.centre(level)
            text = f"loss outside for {out.steps} steps: level learned anew, {was:.4g} -> {now:.4g}"
            events = (*events, self._event(outcome, "regime", now, limit, text))
        return Observation(state, events, requests)

    def _shifted(self, state: SpikeState, outcome: Outcome, by_norm: bool) -> Observation[SpikeState]:
        """The norm alone is outside: a spike if it comes back within ``regime_after`` steps, else a new level."""
        out = self._further(state.norm_out, outcome.grad_norm)
        state = state._replace(norm_out=out, loss_out=_INSIDE)
        norm, limit = outcome.grad_norm, self._norm.limit(state.norm)
        events: tuple[Event, ...] = ()
        if by_norm:
            reason = self._sentence("grad_norm", norm, self._norm, state.norm, True)
            events = (self._event(outcome, "spike", norm, limit, f"{reason}, step {out.steps} outside"),)
        if out.steps >= self.regime_after:
            was = self._norm.centre(state.norm)
            level = self._norm.relearn(state.norm, out.values)
            state = state._replace(norm=level, norm_out=_INSIDE)
            now = self._norm.centre(level)
            reason = (
                f"grad_norm outside for {out.steps} steps, the loss within its limit: "
                f"level learned anew, {was:.4g} -> {now:.4g}"
            )
            events = (*events, self._event(outcome, "regime", now, limit, reason))
        return Observation(state, events)

    def _nonfinite(self, state: SpikeState, outcome: Outcome) -> Observation[SpikeState]:
        """A class of its own: it enters no baseline, and neither begins nor ends an excursion."""
        in_a_row = state.nonfinite + 1
        state = self._counted(state, True, nonfinite=in_a_row)
        if in_a_row > self.patience and in_a_row % self.patience:
            return Observation(state)
        value = outcome.grad_norm if math.isfinite(outcome.loss) else outcome.loss
        reason = f"loss {outcome.loss:.6g}, grad_norm {outcome.grad_norm:.6g} ({in_a_row} non-finite in a row)"
        event = self._event(outcome, "nonfinite", value, math.nan, reason)
        return Observation(state, (event,), () if in_a_row % self.patience else self._demand(reason))

    # ---- helpers ----------------------------------------------------------------------------------------------------

    @cached_property
    def _loss(self) -> OutlierTest:
        return OutlierTest(self.z_threshold, self.window, self.delay, self.min_samples, self.min_sigma_loss, log=False)

    @cached_property
    def _norm(self) -> OutlierTest:
        return OutlierTest(self.z_threshold, self.window, self.delay, self.min_samples, self.min_sigma_norm, log=True)

    def _counted(self, state: SpikeState, flagged: bool, nonfinite: int) -> SpikeState:
        loss, norm, loss_out, norm_out, _, seen, numbers = state
        if numbers and numbers[0] <= seen - self.score_window:
            numbers = numbers[1:]
        numbers = (*numbers, seen) if flagged else numbers
        return SpikeState(loss, norm, loss_out, norm_out, nonfinite, seen + 1, numbers)

    def _further(self, out: Excursion, value: float) -> Excursion:
        return Excursion(out.steps + 1, (*out.values, value)[-self.window :])

    def _demand(self, reason: str) -> tuple[Request, ...]:
        return (Request(RequestKind.ROLLBACK, self.label, reason),) if self.asks() else ()

    def _event(self, outcome: Outcome, kind: EventKind, value: float, limit: float, reason: str) -> Event:
        return Event(outcome.step, self.label, kind, value, limit, reason)

    def _sentence(self, signal: str, value: float, gauge: OutlierTest, baseline: Baseline, beyond: bool) -> str:
        centre, steps = gauge.centre(baseline), len(baseline.past.window)
        sign = ">" if beyond else "near the limit"
        return f"{signal} {value:.4g} {sign} {gauge.limit(baseline):.4g} (median {centre:.4g} of {steps} steps)"
