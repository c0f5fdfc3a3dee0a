"""Detection of spikes, divergences, level shifts and non-finite steps from loss and gradient norm.

It is part of the core because several plugins use it, so that a detector and a rollback make the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from stabletrain.core import positions
from stabletrain.core.baseline import Baseline, OutlierTest
from stabletrain.core.events import Event, EventKind, Request, RequestKind
from stabletrain.core.learning import Learning, NotLearning
from stabletrain.core.lengths import Length, LengthLike, RunLength
from stabletrain.core.limits import NO_LIMITS, Limits
from stabletrain.core.metric_names import MetricInfo
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule
from stabletrain.core.slow_rise import IN_A_ROW, MEAN_OF, Rise, SlowRise

SPIKE_SCORE = MetricInfo("stability/spike_score", "0 to 1", "share of flagged steps among the last `score_window`")
"""The metric of a detector."""


class Excursion(NamedTuple):
    """Consecutive steps in which a signal is away from its baseline.

    Args:
        steps: number of finite steps since it began, including the first; 0: the signal is at its baseline.
        values: the values of these steps, the last ``window`` of them.
    """

    steps: int = 0
    values: tuple[float, ...] = ()


_NO_EXCURSION = Excursion()


class SpikeState(NamedTuple):
    """State of the detector.

    Args:
        loss: baseline of the loss.
        norm: baseline of the gradient norm.
        loss_excursion: current excursion of the loss.
        norm_excursion: current excursion of the norm; none while the loss has one.
        nonfinite: number of consecutive non-finite steps up to the last step.
        seen: number of observed steps, without fp16 overflows.
        flagged: indices (counted as in ``seen``, from 0) of the flagged steps among the last ``score_window``.
        rise: what is remembered of the losses of applied steps outside of excursions, to find a slow rise.
        learning: the check whether the loss has fallen at all.
    """

    loss: Baseline = Baseline()
    norm: Baseline = Baseline()
    loss_excursion: Excursion = _NO_EXCURSION
    norm_excursion: Excursion = _NO_EXCURSION
    nonfinite: int = 0
    seen: int = 0
    flagged: tuple[int, ...] = ()
    rise: SlowRise = SlowRise()
    learning: Learning = Learning()


@dataclass(frozen=True, kw_only=True)
class SpikeDetection(Rule[SpikeState]):
    """Base class of rules that detect spikes, divergences, level shifts and non-finite steps; it sets no limits.

    Loss and raw gradient norm are compared with median and MAD of a delayed window of accepted steps: applied, finite,
    and without an excursion of either signal. An excursion begins with an outlier and ends when the signal falls below
    the midpoint of centre and limit. A rise of the loss that is too slow for an outlier is a divergence too, and a loss
    that has not fallen in the first tenth of the run is reported, see `slow_rise` and `learning`.

    Args:
        z_threshold: distance of the limit from the median, in robust standard deviations, > 0.
        window: steps of history, >= 2.
        delay: steps after which an accepted step enters the history, >= 0.
        min_samples: steps of history from which on there is a limit, 2 to ``window``.
        patience: steps after which an excursion of the loss is a divergence, 1 to ``window``; also the number of
            consecutive non-finite steps after which a rollback is requested.
        regime_after: steps after which an excursion of the norm alone is a level shift, 2 to ``window``.
        min_sigma_norm: floor of the norm's standard deviation, in nats of its logarithm, > 0.
        min_sigma_loss: floor of the loss's standard deviation, as a share of its median, >= 0.
        score_window: steps over which ``stability/spike_score`` is computed, >= 1.
        expect: positions at which the training changes by design, such as ``[600, "3ep"]``: from there all rules learn
            their baselines anew. Applied steps, epochs or percent of the run, above 0; None: none.

    Raises:
        UserError: if an argument is out of range.
    """

    compares_loss = True

    z_threshold: float = 6.0
    window: int = 128
    delay: int = 32
    min_samples: int = 64
    patience: int = 20
    regime_after: int = 20
    min_sigma_norm: float = 0.05
    min_sigma_loss: float = 0.02
    score_window: int = 10_000
    expect: Sequence[LengthLike] | None = None

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
        self.expected_changes()

    def init(self) -> SpikeState:
        """Empty baselines."""
        return SpikeState()

    def limits(self, state: SpikeState) -> Limits:
        """No limits: the detector only reports."""
        return NO_LIMITS

    def readings(self, state: SpikeState) -> dict[str, float]:
        """`SPIKE_SCORE`: share of flagged steps among the last ``score_window``."""
        steps = min(state.seen, self.score_window)
        return {"spike_score": len(state.flagged) / steps} if steps else {}

    def observe(self, state: SpikeState, outcome: Outcome) -> Observation[SpikeState]:
        """Classify a step; add it to the baselines if it is accepted."""
        if outcome.overflow:
            return Observation(state)
        loss, norm = outcome.loss, outcome.grad_norm
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return self._nonfinite(state, outcome)
        limit = self._loss_limit(state)
        by_loss, by_norm = loss > limit, self._norm.is_outlier(state.norm, norm)
        away = by_loss or (state.loss_excursion.steps and limit < math.inf and self._loss.is_raised(state.loss, loss))
        rise, learning, risen, stuck = state.rise, state.learning, None, None
        if outcome.applied and not away:
            rise, risen = rise.add(loss, outcome.step)
            if learning.due is not None:
                learning, stuck = learning.add(rise)
        if away:
            state = self._count(state, by_loss or by_norm, 0, rise, learning)
            observation = self._loss_away(state, outcome, by_loss, by_norm)
        elif by_norm or (state.norm_excursion.steps and self._norm.is_raised(state.norm, norm)):
            state = self._count(state, by_norm, 0, rise, learning)
            observation = self._norm_away(state, outcome, by_norm)
        else:
            losses, norms = state.loss, state.norm
            if outcome.applied:
                losses, norms = self._loss.learn(losses, loss), self._norm.learn(norms, norm)
            flagged = self._flagged(state)
            observation = Observation(
                SpikeState(losses, norms, seen=state.seen + 1, flagged=flagged, rise=rise, learning=learning)
            )
        return observation if risen is None and stuck is None else self._level(observation, outcome, risen, stuck)

    def rebase(self, state: SpikeState, cause: str) -> SpikeState:
        """The baselines at the snapshot, without an excursion."""
        return state._replace(
            loss_excursion=_NO_EXCURSION, norm_excursion=_NO_EXCURSION, nonfinite=0, rise=state.rise.rebase()
        )

    def begin(self, state: SpikeState, run: RunLength, applied: int) -> SpikeState:
        """Make the check whether the loss falls, if the run's length and its first losses are known."""
        if state.seen:
            due = state.learning.due is not None
            return state._replace(learning=state.learning.within(run.total_steps)) if due else state
        return state if applied else state._replace(learning=Learning().within(run.total_steps))

    def at_new_level(self, state: SpikeState, losses: Iterable[float] = ()) -> SpikeState:
        """The state if a new level of the loss is known or meant: a slow rise is measured from it on.

        Args:
            state: with the baselines of the new level, or with any.
            losses: finite losses at the new level so far, oldest first.
        """
        return state._replace(rise=state.rise.restart(losses), learning=Learning())

    def accept_level(self, state: SpikeState, losses: Sequence[float], norms: Sequence[float]) -> SpikeState:
        """Learn the level of these steps; up to its limits, later steps are no excursion."""
        loss, norm = self._loss.accept(state.loss, losses), self._norm.accept(state.norm, norms)
        state = state._replace(loss=loss, norm=norm, loss_excursion=_NO_EXCURSION, norm_excursion=_NO_EXCURSION)
        return self.at_new_level(state)

    def forget(self, state: SpikeState) -> SpikeState:
        """Empty baselines; the counts of flagged steps and of non-finite steps in a row continue."""
        empty = SpikeState(nonfinite=state.nonfinite, seen=state.seen, flagged=state.flagged)
        return self.at_new_level(empty)

    def expected_changes(self) -> tuple[Length, ...]:
        """The positions of ``expect``."""
        return positions.parse(self.expect or (), name=self.setting("expect"))

    def requests_rollback(self) -> bool:
        """Whether a divergence requests a rollback."""
        return True

    def requests_rollback_of_slow_rise(self) -> bool:
        """Whether a slow rise requests a rollback."""
        return False

    # ---- classification ----------------------------------------------------------------------------------------------

    def _loss_away(self, state: SpikeState, outcome: Outcome, by_loss: bool, by_norm: bool) -> Observation[SpikeState]:
        """Excursion of the loss: a spike if it ends within ``patience`` steps, else a divergence."""
        excursion = self._extend(state.loss_excursion, outcome.loss)
        state = state._replace(loss_excursion=excursion, norm_excursion=_NO_EXCURSION)
        loss, limit = outcome.loss, self._loss_limit(state)
        reason = self._comparison("loss", loss, self._loss, state.loss, by_loss)
        events: tuple[Event, ...] = ()
        requests: tuple[Request, ...] = ()
        if excursion.steps % self.patience == 0:
            reason = f"{reason}, not back within {excursion.steps} steps (plugins.{self.slot}.patience={self.patience})"
            events = (self._event(outcome, "divergence", loss, limit, reason),)
            requests = self._rollback(reason)
        elif by_loss and excursion.steps < self.patience:
            events = (self._event(outcome, "spike", loss, limit, f"{reason}, step {excursion.steps} of the excursion"),)
        elif by_norm and excursion.steps < self.patience:
            reason = self._comparison("grad_norm", outcome.grad_norm, self._norm, state.norm, True)
            value, limit = outcome.grad_norm, self._norm.limit(state.norm)
            events = (
                self._event(outcome, "spike", value, limit, f"{reason}, step {excursion.steps} of the excursion"),
            )
        if excursion.steps >= self.window:
            was = self._loss.centre(state.loss)
            level = self._loss.relearn(state.loss, excursion.values)
            state = self.at_new_level(state._replace(loss=level, loss_excursion=_NO_EXCURSION), excursion.values)
            now = self._loss.centre(level)
            text = f"loss raised for {excursion.steps} steps: new level learned, {was:.4g} -> {now:.4g}"
            events = (*events, self._event(outcome, "regime", now, limit, text))
        return Observation(state, events, requests)

    def _norm_away(self, state: SpikeState, outcome: Outcome, by_norm: bool) -> Observation[SpikeState]:
        """Excursion of the norm alone: a spike if it ends within ``regime_after`` steps, else a level shift."""
        excursion = self._extend(state.norm_excursion, outcome.grad_norm)
        state = state._replace(norm_excursion=excursion, loss_excursion=_NO_EXCURSION)
        norm, limit = outcome.grad_norm, self._norm.limit(state.norm)
        events: tuple[Event, ...] = ()
        if by_norm:
            reason = self._comparison("grad_norm", norm, self._norm, state.norm, True)
            events = (self._event(outcome, "spike", norm, limit, f"{reason}, step {excursion.steps} of the excursion"),)
        if excursion.steps >= self.regime_after:
            was = self._norm.centre(state.norm)
            level = self._norm.relearn(state.norm, excursion.values)
            state = state._replace(norm=level, norm_excursion=_NO_EXCURSION)
            now = self._norm.centre(level)
            reason = (
                f"grad_norm raised for {excursion.steps} steps, the loss within its limit: "
                f"new level learned, {was:.4g} -> {now:.4g}"
            )
            events = (*events, self._event(outcome, "regime", now, limit, reason))
        return Observation(state, events)

    def _nonfinite(self, state: SpikeState, outcome: Outcome) -> Observation[SpikeState]:
        """A non-finite step enters no baseline, and neither begins nor ends an excursion."""
        in_a_row = state.nonfinite + 1
        state = self._count(state, True, in_a_row, state.rise, state.learning)
        requests_rollback = self.requests_rollback() and in_a_row % self.patience == 0
        if in_a_row > (1 if outcome.applied else self.patience) and not requests_rollback:
            return Observation(state)  # after an applied one, the weights and all later steps may be NaN
        value = outcome.grad_norm if math.isfinite(outcome.loss) else outcome.loss
        reason = f"loss {outcome.loss:.6g}, grad_norm {outcome.grad_norm:.6g} ({in_a_row} non-finite in a row)"
        event = self._event(outcome, "nonfinite", value, math.nan, reason)
        return Observation(state, (event,), self._rollback(reason) if requests_rollback else ())

    def _level(
        self, so_far: Observation[SpikeState], outcome: Outcome, risen: Rise | None, stuck: NotLearning | None
    ) -> Observation[SpikeState]:
        """Add a slow rise, or a loss that has not fallen since the start."""
        state, events, requests = so_far
        if risen is not None:
            reason = (
                f"the loss has risen slowly: mean of the last {MEAN_OF} steps {risen.mean:.4g} > "
                f"{risen.limit:.4g}, {IN_A_ROW} steps in a row (lowest mean {risen.lowest:.4g} at step {risen.step})"
            )
            events = (*events, self._event(outcome, "divergence", risen.mean, risen.limit, reason))
            if self.requests_rollback_of_slow_rise():
                requests = (*requests, Request(RequestKind.ROLLBACK, self.label, reason))
        if stuck is not None:
            reason = (
                f"the loss has not fallen in the first {stuck.steps} steps: at first {stuck.first:.4g}, lowest mean of "
                f"{MEAN_OF} steps {stuck.lowest:.4g}, noise {stuck.noise:.2g}. Unless the weights were trained before, "
                "check the learning rate, the trainable parameters and the labels"
            )
            events = (*events, self._event(outcome, "not_learning", stuck.lowest, stuck.limit, reason))
        return Observation(state, events, requests)

    # ---- helpers ----------------------------------------------------------------------------------------------------

    @cached_property
    def _loss(self) -> OutlierTest:
        return OutlierTest(self.z_threshold, self.window, self.delay, self.min_samples, self.min_sigma_loss, log=False)

    @cached_property
    def _norm(self) -> OutlierTest:
        return OutlierTest(self.z_threshold, self.window, self.delay, self.min_samples, self.min_sigma_norm, log=True)

    def _loss_limit(self, state: SpikeState) -> float:
        return self._loss.limit(state.loss, self._norm.rounding_size(state.norm))

    def _count(
        self, state: SpikeState, flagged: bool, nonfinite: int, rise: SlowRise, learning: Learning
    ) -> SpikeState:
        loss, norm, loss_excursion, norm_excursion, _, seen, _, _, _ = state
        numbers = (*self._flagged(state), seen) if flagged else self._flagged(state)
        return SpikeState(loss, norm, loss_excursion, norm_excursion, nonfinite, seen + 1, numbers, rise, learning)

    def _flagged(self, state: SpikeState) -> tuple[int, ...]:
        """The flagged steps that are still within ``score_window`` when one more step is observed."""
        numbers = state.flagged
        return numbers[1:] if numbers and numbers[0] <= state.seen - self.score_window else numbers

    def _extend(self, excursion: Excursion, value: float) -> Excursion:
        return Excursion(excursion.steps + 1, (*excursion.values, value)[-self.window :])

    def _rollback(self, reason: str) -> tuple[Request, ...]:
        return (Request(RequestKind.ROLLBACK, self.label, reason),) if self.requests_rollback() else ()

    def _event(self, outcome: Outcome, kind: EventKind, value: float, limit: float, reason: str) -> Event:
        return Event(outcome.step, self.label, kind, value, limit, reason)

    def _comparison(self, signal: str, value: float, test: OutlierTest, baseline: Baseline, above: bool) -> str:
        centre, steps = test.centre(baseline), len(baseline.past.window)
        sign = ">" if above else "near the limit"
        return f"{signal} {value:.4g} {sign} {test.limit(baseline):.4g} (median {centre:.4g} of {steps} steps)"
