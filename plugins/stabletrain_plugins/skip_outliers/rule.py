"""Drop outliers of the loss and of the gradient norm, and tell them from a new level of the norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self

from stabletrain.core.baseline import Baseline, OutlierTest
from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.limits import NO_LIMITS, Bound, Limits, SkipAbove
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule

_NO_BOUNDS: frozenset[Bound] = frozenset()


class OutlierState(NamedTuple):
    """What the rule remembers.

    Args:
        loss: baseline of the loss.
        norm: baseline of the gradient norm.
        in_a_row: length of the current run of dropped steps.
        suspects: norms that may be a new level.
        shifted: how many of the suspects were dropped.
    """

    loss: Baseline = Baseline()
    norm: Baseline = Baseline()
    in_a_row: int = 0
    suspects: tuple[float, ...] = ()
    shifted: int = 0


@dataclass(frozen=True)
class SkipOutliersRule(Rule[OutlierState]):
    """Drop a step whose loss or gradient norm lies far above its recent history, as if its batches had not been seen.

    A norm is dropped above ``exp(m + sigmas * s)``, with median ``m`` and scaled MAD ``s`` of the logarithms of the
    last ``window`` norms. A loss is dropped above the highest of three limits: ``m + sigmas * s`` of the last losses;
    ``m * (q / m) ** (1.4826 * sigmas)`` with their upper quartile ``q``, the same for a log-normal loss, as that of
    small batches is near the end of training; and ``m + sigmas * (t - m) / 1.7`` with their 98th percentile ``t``, for
    batches of very different sizes. Only applied, finite steps enter the history, so a burst cannot hide itself.

    When the norm alone is dropped ``regime_after`` times while the loss stays within its limit, its level has changed:
    it is learned anew from the dropped norms. ``max_in_a_row`` dropped steps are not outliers but a damaged state: the
    rule asks for a rollback, which without a plugin that can roll back is a clean stop. A zero norm is neither an
    outlier nor history.

    Args:
        sigmas: standard deviations above the centre at which a step is dropped, > 0.
        window: steps of history, >= 2.
        min_samples: steps that are only learned from, 2 to ``window``.
        signals: what is watched: ``"both"``, ``"loss"`` or ``"grad_norm"``.
        robust: median and MAD; else mean and standard deviation (of n - 1), and only the first limit of the loss.
        log_norm: judge the norm in log space; else linearly.
        min_sigma_norm: floor of the norm's standard deviation: in nats, > 0; with ``log_norm=False`` as a share of the
            centre, >= 0.
        min_sigma_loss: floor of the loss's standard deviation, as a share of the centre, >= 0.
        keep_outliers: let dropped steps enter the history too, so that it follows any change by itself.
        regime_after: steps dropped for their norm alone after which its level is learned anew, >= 2; None: never. It
            has no meaning with ``keep_outliers``.
        max_in_a_row: dropped steps in a row after which the run is given up, > ``regime_after``.

    Raises:
        UserError: if an argument is out of range.

    References:
        OLMo et al., 2 OLMo 2 Furious, 2025, https://arxiv.org/abs/2501.00656 (skipping by a sigma rule). Leys et al.,
        Detecting outliers: do not use standard deviation around the mean, use absolute deviation around the median,
        2013, https://doi.org/10.1016/j.jesp.2013.03.013

    >>> from stabletrain.core.rule import replay
    >>> rule = SkipOutliersRule(min_samples=4)
    >>> norms = [1.0, 1.1, 0.9, 1.0, 50.0, 60.0, 1.05]
    >>> [step.outcome.skipped for step in replay(rule, [(2.0, g) for g in norms])]
    [False, False, False, False, True, True, False]
    """

    plugin = "skip_outliers"
    slot = "outliers"

    sigmas: float = 6.0
    window: int = 128
    min_samples: int = 64
    signals: Literal["both", "loss", "grad_norm"] = "both"
    robust: bool = True
    log_norm: bool = True
    min_sigma_norm: float = 0.2
    min_sigma_loss: float = 0.02
    keep_outliers: bool = False
    regime_after: int | None = 20
    max_in_a_row: int = 30

    def __post_init__(self) -> None:
        self.require(0 < self.sigmas < math.inf, "sigmas", "> 0 and finite")
        self.require(self.window >= 2, "window", ">= 2")
        self.require(2 <= self.min_samples <= self.window, "min_samples", f"from 2 to window={self.window}")
        self.require(self.signals in ("both", "loss", "grad_norm"), "signals", '"both", "loss" or "grad_norm"')
        self.require(0 <= self.min_sigma_norm < math.inf, "min_sigma_norm", ">= 0 and finite")
        self.require(not self.log_norm or self.min_sigma_norm > 0, "min_sigma_norm", "> 0 in log space (log_norm=True)")
        self.require(0 <= self.min_sigma_loss < math.inf, "min_sigma_loss", ">= 0 and finite")
        self.require(self.regime_after is None or self.regime_after >= 2, "regime_after", ">= 2 or None")
        least = self.regime_after or 0
        self.require(
            self.max_in_a_row > least, "max_in_a_row", f"> regime_after={self.regime_after}" if least else "> 0"
        )

    @classmethod
    def olmo(
        cls,
        *,
        sigmas: float = 6.0,
        window: int = 128,
        signals: Literal["both", "loss", "grad_norm"] = "both",
        keep_outliers: bool = True,
        max_in_a_row: int = 30,
        name: str | None = None,
    ) -> Self:
        """The rule of OLMo-core's ``SkipStepOptimizer``: mean + 6 standard deviations, linear, over 128 steps.

        It differs where one NaN makes the reference drop every step until it has left the window, and where a resumed
        run is unprotected until the window has filled again.

        Args:
            sigmas: its ``sigma_factor``, > 0.
            window: its ``rolling_interval_length``, >= 20; half of it is only learned from.
            signals: ``"both"``, ``"loss"`` or ``"grad_norm"``.
            keep_outliers: True, as published, lets the first spikes of a burst hide the later ones; False does not.
            max_in_a_row: as in the rule itself; not in the reference.
            name: as in the rule itself.
        """
        return cls(
            sigmas=sigmas,
            window=window,
            min_samples=max(20, window // 2) - 1,  # the reference counts the step in question too
            signals=signals,
            robust=False,
            log_norm=False,
            min_sigma_norm=0.0,
            min_sigma_loss=0.0,
            keep_outliers=keep_outliers,
            regime_after=None,
            max_in_a_row=max_in_a_row,
            name=name,
        )

    def init(self) -> OutlierState:
        """Nothing is known yet."""
        return OutlierState()

    def limits(self, state: OutlierState) -> Limits:
        """The limits that were computed when the last step entered the history."""
        loss, norm = self._loss.limit(state.loss), self._norm.limit(state.norm)
        if loss == math.inf or self.signals == "grad_norm":
            return NO_LIMITS if norm == math.inf else Limits(_NO_BOUNDS, frozenset((SkipAbove("grad_norm", norm),)))
        if norm == math.inf or self.signals == "loss":
            return Limits(_NO_BOUNDS, frozenset((SkipAbove("loss", loss),)))
        return Limits(_NO_BOUNDS, frozenset((SkipAbove("loss", loss), SkipAbove("grad_norm", norm))))

    def observe(self, state: OutlierState, outcome: Outcome) -> Observation[OutlierState]:
        """Learn an applied step; judge one that this rule dropped."""
        loss, norm = outcome.loss, outcome.grad_norm
        if not (math.isfinite(loss) and math.isfinite(norm)) or outcome.overflow:
            return Observation(state)
        if not outcome.skipped:
            return Observation(self._learn(state, loss, norm))
        loss_above = loss > self._loss.limit(state.loss)
        norm_above = norm > self._norm.limit(state.norm)
        if norm_above or (loss_above and self.signals != "grad_norm"):
            return self._outlier(state, outcome, loss_above, norm_above)
        return Observation(state)  # another rule dropped it

    def rebase(self, state: OutlierState, cause: str) -> OutlierState:
        """The history at the snapshot; the run of dropped steps is over."""
        return state._replace(in_a_row=0, suspects=(), shifted=0)

    # ---- the history ------------------------------------------------------------------------------------------------

    def _learn(self, state: OutlierState, loss: float, norm: float) -> OutlierState:
        level, suspects, shifted = state.norm, state.suspects, state.shifted
        if self.signals != "loss" and norm > 0.0:
            if suspects:
                # a value near the limit is no return to the old level, or a shift as far as the limit would drop half
                # of the steps until the window has filled
                near = self._norm.is_raised(level, norm)
                suspects, shifted = ((*suspects, norm)[-self.window :], shifted) if near else ((), 0)
            level = self._norm.learn(level, norm)
        return OutlierState(self._loss.learn(state.loss, loss), level, 0, suspects, shifted)

    def _outlier(
        self, state: OutlierState, outcome: Outcome, loss_above: bool, norm_above: bool
    ) -> Observation[OutlierState]:
        loss, norm, in_a_row = outcome.loss, outcome.grad_norm, state.in_a_row + 1
        by_loss = loss_above and self.signals != "grad_norm"
        signals = [("loss", loss, self._loss, state.loss)] if by_loss else []
        if norm_above:
            signals.append(("grad_norm", norm, self._norm, state.norm))
        what = " and ".join(self._sentence(*signal) for signal in signals)
        _, value, gauge, baseline = signals[0]
        limit = gauge.limit(baseline)
        reason = f"{what}: step skipped ({in_a_row} in a row)"
        events: tuple[Event, ...] = (Event(outcome.step, self.label, "skip", value, limit, reason),)

        if self.keep_outliers:
            state = self._learn(state, loss, norm)._replace(in_a_row=in_a_row)
        elif loss_above:
            state = state._replace(in_a_row=in_a_row, suspects=(), shifted=0)
        else:
            suspects = (*state.suspects, norm)[-self.window :]
            state = state._replace(in_a_row=in_a_row, suspects=suspects, shifted=state.shifted + 1)
            if self.regime_after is not None and state.shifted >= self.regime_after:
                state, event = self._relearn(state, outcome.step)
                events += (event,)
        if state.in_a_row < self.max_in_a_row:
            return Observation(state, events)
        demand = f"{in_a_row} outliers in a row (plugins.outliers.max_in_a_row={self.max_in_a_row}); last: {what}"
        request = Request(RequestKind.ROLLBACK, self.label, demand)
        return Observation(state._replace(in_a_row=0, suspects=(), shifted=0), events, (request,))

    def _relearn(self, state: OutlierState, step: int) -> tuple[OutlierState, Event]:
        level = self._norm.relearn(state.norm, state.suspects)
        was, now, limit = self._norm.centre(state.norm), self._norm.centre(level), self._norm.limit(state.norm)
        reason = (
            f"grad_norm above {limit:.4g} in {state.shifted} steps, the loss within its limit: "
            f"level learned anew, {was:.4g} -> {now:.4g}"
        )
        return OutlierState(state.loss, level), Event(step, self.label, "regime", now, limit, reason)

    # ---- the yardsticks ---------------------------------------------------------------------------------------------

    @cached_property
    def _loss(self) -> OutlierTest:
        return self._gauge(self.min_sigma_loss, log=False)

    @cached_property
    def _norm(self) -> OutlierTest:
        return self._gauge(self.min_sigma_norm, self.log_norm)

    def _gauge(self, min_sigma: float, log: bool) -> OutlierTest:
        return OutlierTest(self.sigmas, self.window, 0, self.min_samples, min_sigma, log, self.robust)

    def _sentence(self, signal: str, value: float, gauge: OutlierTest, baseline: Baseline) -> str:
        statistic, steps = "median" if self.robust else "mean", len(baseline.past.window)
        limit, centre = gauge.limit(baseline), gauge.centre(baseline)
        return f"{signal} {value:.4g} > {limit:.4g} ({statistic} {centre:.4g} of {steps} steps)"
