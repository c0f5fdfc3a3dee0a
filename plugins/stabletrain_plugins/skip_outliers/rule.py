"""Drop outliers of the loss and of the gradient norm; learn a new level of the norm."""

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
    """State of the rule.

    Args:
        loss: baseline of the loss.
        norm: baseline of the gradient norm.
        in_a_row: number of consecutive dropped steps up to the last step.
        candidates: norms that may belong to a new level.
        dropped: number of candidates whose step was dropped.
    """

    loss: Baseline = Baseline()
    norm: Baseline = Baseline()
    in_a_row: int = 0
    candidates: tuple[float, ...] = ()
    dropped: int = 0


@dataclass(frozen=True)
class SkipOutliersRule(Rule[OutlierState]):
    """Drop a step whose loss or gradient norm lies far above its recent history, as if its batches had not been seen.

    The limit of the norm is ``exp(m + sigmas * s)``, with median ``m`` and scaled MAD ``s`` of the logarithms of the
    last ``window`` norms. The limit of the loss is the highest of three: ``m + sigmas * s`` of the last losses;
    ``m * (q / m) ** (1.4826 * sigmas)`` with their upper quartile ``q``, for a log-normal loss, such as that of small
    batches near the end of training; and ``m + sigmas * (t - m) / 1.7`` with their 98th percentile ``t``, for batches
    of very different sizes. Only applied, finite steps enter the history, so a burst does not raise its own limit.

    After ``regime_after`` steps that were dropped for their norm alone, the loss within its limit, the norm has a new
    level: its history is replaced by the norms of those steps. After ``max_in_a_row`` dropped steps in a row the rule
    requests a rollback, because the weights may be damaged; if no plugin can roll back, the run stops cleanly. A zero
    norm is not an outlier and does not enter the history.

    Args:
        sigmas: standard deviations above the centre at which a step is dropped, > 0.
        window: steps of history, >= 2.
        min_samples: steps of history from which on there is a limit, 2 to ``window``.
        signals: signals with a limit: ``"both"``, ``"loss"`` or ``"grad_norm"``.
        robust: use median and MAD; else mean and standard deviation (of n - 1), and only the first limit of the loss.
        log_norm: test the norm in log space; else in linear space.
        min_sigma_norm: floor of the norm's standard deviation: in nats, > 0; with ``log_norm=False`` as a share of the
            centre, >= 0.
        min_sigma_loss: floor of the loss's standard deviation, as a share of the centre, >= 0.
        keep_outliers: let dropped steps enter the history too, so that it follows any change.
        regime_after: steps dropped for their norm alone after which a new level is learned, >= 2; None: never. It has
            no effect with ``keep_outliers``.
        max_in_a_row: dropped steps in a row after which a rollback is requested, > ``regime_after``.

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

        Two differences: in the reference one NaN makes every step an outlier until it leaves the window, and a resumed
        run has no limits until the window is half full again.

        Args:
            sigmas: its ``sigma_factor``, > 0.
            window: its ``rolling_interval_length``, >= 20; there are no limits until half of it is filled.
            signals: ``"both"``, ``"loss"`` or ``"grad_norm"``.
            keep_outliers: True, as published, lets the first spikes of a burst raise the limit for the later ones.
            max_in_a_row: as in the constructor; not in the reference.
            name: as in the constructor.
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
        """Empty baselines."""
        return OutlierState()

    def limits(self, state: OutlierState) -> Limits:
        """The limits of the two baselines, as far as they exist and their signals are selected."""
        loss, norm = self._loss.limit(state.loss), self._norm.limit(state.norm)
        if loss == math.inf or self.signals == "grad_norm":
            return NO_LIMITS if norm == math.inf else Limits(_NO_BOUNDS, frozenset((SkipAbove("grad_norm", norm),)))
        if norm == math.inf or self.signals == "loss":
            return Limits(_NO_BOUNDS, frozenset((SkipAbove("loss", loss),)))
        return Limits(_NO_BOUNDS, frozenset((SkipAbove("loss", loss), SkipAbove("grad_norm", norm))))

    def observe(self, state: OutlierState, outcome: Outcome) -> Observation[OutlierState]:
        """Add an applied step to the history, or count a step that this rule dropped."""
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
        """The history at the snapshot, with all counts reset."""
        return state._replace(in_a_row=0, candidates=(), dropped=0)

    # ---- the history ------------------------------------------------------------------------------------------------

    def _learn(self, state: OutlierState, loss: float, norm: float) -> OutlierState:
        level, candidates, dropped = state.norm, state.candidates, state.dropped
        if self.signals != "loss" and norm > 0.0:
            if candidates:
                # an accepted norm near the limit does not discard the candidates: after a shift of the level as far as
                # the limit, half of the steps would else be dropped until the window has filled
                raised = self._norm.is_raised(level, norm)
                candidates, dropped = ((*candidates, norm)[-self.window :], dropped) if raised else ((), 0)
            level = self._norm.learn(level, norm)
        return OutlierState(self._loss.learn(state.loss, loss), level, 0, candidates, dropped)

    def _outlier(
        self, state: OutlierState, outcome: Outcome, loss_above: bool, norm_above: bool
    ) -> Observation[OutlierState]:
        loss, norm, in_a_row = outcome.loss, outcome.grad_norm, state.in_a_row + 1
        by_loss = loss_above and self.signals != "grad_norm"
        signals = [("loss", loss, self._loss, state.loss)] if by_loss else []
        if norm_above:
            signals.append(("grad_norm", norm, self._norm, state.norm))
        what = " and ".join(self._comparison(*signal) for signal in signals)
        _, value, test, baseline = signals[0]
        limit = test.limit(baseline)
        reason = f"{what}: step skipped ({in_a_row} in a row)"
        events: tuple[Event, ...] = (Event(outcome.step, self.label, "skip", value, limit, reason),)

        if self.keep_outliers:
            state = self._learn(state, loss, norm)._replace(in_a_row=in_a_row)
        elif loss_above:
            state = state._replace(in_a_row=in_a_row, candidates=(), dropped=0)
        else:
            candidates = (*state.candidates, norm)[-self.window :]
            state = state._replace(in_a_row=in_a_row, candidates=candidates, dropped=state.dropped + 1)
            if self.regime_after is not None and state.dropped >= self.regime_after:
                state, event = self._relearn(state, outcome.step)
                events += (event,)
        if state.in_a_row < self.max_in_a_row:
            return Observation(state, events)
        reason = f"{in_a_row} outliers in a row (plugins.outliers.max_in_a_row={self.max_in_a_row}); last: {what}"
        request = Request(RequestKind.ROLLBACK, self.label, reason)
        return Observation(state._replace(in_a_row=0, candidates=(), dropped=0), events, (request,))

    def _relearn(self, state: OutlierState, step: int) -> tuple[OutlierState, Event]:
        level = self._norm.relearn(state.norm, state.candidates)
        was, now, limit = self._norm.centre(state.norm), self._norm.centre(level), self._norm.limit(state.norm)
        reason = (
            f"grad_norm above {limit:.4g} in {state.dropped} steps, the loss within its limit: "
            f"new level learned, {was:.4g} -> {now:.4g}"
        )
        return OutlierState(state.loss, level), Event(step, self.label, "regime", now, limit, reason)

    # ---- the outlier tests -------------------------------------------------------------------------------------------

    @cached_property
    def _loss(self) -> OutlierTest:
        return self._test(self.min_sigma_loss, log=False)

    @cached_property
    def _norm(self) -> OutlierTest:
        return self._test(self.min_sigma_norm, self.log_norm)

    def _test(self, min_sigma: float, log: bool) -> OutlierTest:
        return OutlierTest(self.sigmas, self.window, 0, self.min_samples, min_sigma, log, self.robust)

    def _comparison(self, signal: str, value: float, test: OutlierTest, baseline: Baseline) -> str:
        statistic, steps = "median" if self.robust else "mean", len(baseline.past.window)
        limit, centre = test.limit(baseline), test.centre(baseline)
        return f"{signal} {value:.4g} > {limit:.4g} ({statistic} {centre:.4g} of {steps} steps)"
