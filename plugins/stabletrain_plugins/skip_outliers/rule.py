"""Drop outliers of the loss and of the gradient norm that come together; learn a new level of the norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self

from stabletrain.core.baseline import Baseline, OutlierTest
from stabletrain.core.events import Event, Request, RequestKind
from stabletrain.core.limits import Bound, Limits, SkipAbove, SkipBelow, SkipCondition
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule

_HEAT_LOST = 0.25
"""Heat lost with each step inside the limits: fewer than one outlier in five steps are never dropped for long."""
_MAX_HEAT = 3.0
"""After a burst, outliers are dropped for at most (3 - 1) / 0.25 = 8 steps."""
_SHARE_STEPS = 300
"""Steps over which the share of raised steps is averaged."""
_COMMON_SHARE = 0.025
"""A share of raised steps up to this leaves the tolerance as it is: healthy norms and losses may have a long tail."""
_TOLERANCE_PER_SHARE, _MAX_TOLERANCE, _LOSS_PER_SHARE = 30.0, 2.75, 20.0
"""How a larger share raises the tolerance (to a maximum that still drops the fourth of a burst) and the heat lost per
step: where a tenth of all steps are outliers, independent of each other, about 0.2 of 1,000 steps are dropped."""
_ABSURD = 1e6
"""A loss lower than the usual one by a million times its typical size is the result of broken arithmetic."""


class OutlierState(NamedTuple):
    """State of the rule.

    Args:
        loss: baseline of the loss.
        norm: baseline of the gradient norm.
        in_a_row: number of consecutive outliers up to the last step, applied ones included.
        candidates: norms that may belong to a new level.
        outside: number of candidates that were outliers.
        heat: rises by 1 with each outlier, falls by 0.25 with each other step.
        share: moving average of the share of raised steps among the applied ones, 0 to 1; None while there is no limit.
    """

    loss: Baseline = Baseline()
    norm: Baseline = Baseline()
    in_a_row: int = 0
    candidates: tuple[float, ...] = ()
    outside: int = 0
    heat: float = 0.0
    share: float | None = None


class _Beyond(NamedTuple):
    """A signal beyond its limit, upwards or (an absurd loss) downwards."""

    name: Literal["loss", "grad_norm"]
    value: float
    limit: float
    below: bool = False


@dataclass(frozen=True)
class SkipOutliersRule(Rule[OutlierState]):
    """Drop steps whose loss or gradient norm lies far above its recent history, if several come close together.

    An outlier alone may be a rare class or domain, which the model has to learn, and is harmless once it is clipped:
    it is applied, as clipped by the clipping plugin, or by this rule's limit of the norm if there is none. Outliers
    that come close together are dropped, as if their batches had not been seen. Each outlier raises the *heat* by 1
    (to at most 3), each other step lowers it by 0.25; an outlier at a heat below ``tolerance`` is applied, else it is
    dropped. So the first of a burst is applied and the others are dropped. Where single outliers recur, several will
    come close together by chance: the tolerance, and the heat lost per step, rise with the share of raised steps
    (outliers, or more than half of the way to a limit) among the last 300 applied ones, for a tenth to 2.75 and 2.5
    times; a burst is then dropped from its fourth on at the latest. Where outliers are known to be errors (wrong
    labels), ``tolerance=0`` drops each of them.

    The limit of the norm is ``exp(m + sigmas * s)``, with median ``m`` and scaled MAD ``s`` of the logarithms of the
    last ``window`` norms. The limit of the loss is the highest of three: ``m + sigmas * s`` of the last losses;
    ``m * (q / m) ** (1.4826 * sigmas)`` with their upper quartile ``q``, for a log-normal loss, such as that of small
    batches near the end of training; and ``m + sigmas * (t - m) / 1.7`` with their 98th percentile ``t``, for batches
    of very different sizes. Only applied, finite steps within the limits enter the history, so a burst does not raise
    its own limit. A loss of rounding size has no limit (its typical size is below 1e-5 of the gradient norm), and one
    far below zero, a million times the usual size, is dropped at any heat.

    After ``regime_after`` outliers of the norm alone, the loss within its limit, the norm has a new level: its history
    is replaced by the norms of those steps. After ``max_in_a_row`` outliers in a row the rule requests a rollback,
    because the weights may be damaged; if no plugin can roll back, the run stops cleanly. A zero norm is not an outlier
    and does not enter the history.

    Args:
        sigmas: standard deviations above the centre at which a step is an outlier, > 0.
        tolerance: heat below which an outlier is applied, >= 0; 0: each outlier is dropped.
        window: steps of history, >= 2.
        min_samples: steps of history from which on there is a limit, 2 to ``window``.
        signals: signals with a limit: ``"both"``, ``"loss"`` or ``"grad_norm"``.
        robust: use median and MAD; else mean and standard deviation (of n - 1), and only the first limit of the loss.
        log_norm: test the norm in log space; else in linear space.
        min_sigma_norm: floor of the norm's standard deviation: in nats, > 0; with ``log_norm=False`` as a share of the
            centre, >= 0.
        min_sigma_loss: floor of the loss's standard deviation, as a share of the centre, >= 0.
        keep_outliers: let outliers enter the history too, so that it follows any change.
        regime_after: outliers of the norm alone after which a new level is learned, >= 2; None: never. It has no effect
            with ``keep_outliers``; else ``tolerance=0`` needs a number, or a new level would be dropped for ever.
        max_in_a_row: outliers in a row after which a rollback is requested, > ``regime_after``.

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
    [False, False, False, False, False, True, False]
    """

    plugin = "skip_outliers"
    slot = "outliers"
    compares_loss = True

    sigmas: float = 6.0
    tolerance: float = 1.0
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
        self.require(0 <= self.tolerance < math.inf, "tolerance", ">= 0 and finite (a heat; 0: drop each outlier)")
        self.require(self.window >= 2, "window", ">= 2")
        self.require(2 <= self.min_samples <= self.window, "min_samples", f"from 2 to window={self.window}")
        self.require(self.signals in ("both", "loss", "grad_norm"), "signals", '"both", "loss" or "grad_norm"')
        self.require(0 <= self.min_sigma_norm < math.inf, "min_sigma_norm", ">= 0 and finite")
        self.require(not self.log_norm or self.min_sigma_norm > 0, "min_sigma_norm", "> 0 in log space (log_norm=True)")
        self.require(0 <= self.min_sigma_loss < math.inf, "min_sigma_loss", ">= 0 and finite")
        self.require(self.regime_after is None or self.regime_after >= 2, "regime_after", ">= 2 or None")
        self.require(
            self.regime_after is not None or self.tolerance > 0 or self.keep_outliers,
            "regime_after",
            ">= 2 with tolerance=0 and keep_outliers=False: without it, a new level of the norm is dropped for ever",
        )
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
            keep_outliers: True, as published, lets the first spikes of a burst raise the limit for the later ones;
                with False, a new level of the norm is learned after 20 of them.
            max_in_a_row: as in the constructor; not in the reference.
            name: as in the constructor.
        """
        return cls(
            sigmas=sigmas,
            tolerance=0.0,
            window=window,
            min_samples=max(20, window // 2) - 1,  # the reference counts the step in question too
            signals=signals,
            robust=False,
            log_norm=False,
            min_sigma_norm=0.0,
            min_sigma_loss=0.0,
            keep_outliers=keep_outliers,
            regime_after=None if keep_outliers else max(2, min(20, max_in_a_row - 1)),
            max_in_a_row=max_in_a_row,
            name=name,
        )

    def init(self) -> OutlierState:
        """Empty baselines."""
        return OutlierState()

    def limits(self, state: OutlierState) -> Limits:
        """Conditions that drop an outlier; while outliers are tolerated, a bound on the norm in case nobody clips."""
        loss, norm = self._loss_limit(state), self._norm_limit(state)
        skips: tuple[SkipCondition, ...] = ()
        if loss < math.inf and self.robust:
            skips = (SkipBelow(self._lowest_loss(state, loss)),)
        if self._tolerates(state):
            fallback = frozenset((Bound(norm, norm),)) if norm < math.inf else frozenset()
            return Limits(skips=frozenset(skips), fallback=fallback)
        if loss < math.inf:
            skips += (SkipAbove("loss", loss),)
        if norm < math.inf:
            skips += (SkipAbove("grad_norm", norm),)
        return Limits(skips=frozenset(skips))

    def observe(self, state: OutlierState, outcome: Outcome) -> Observation[OutlierState]:
        """Count an outlier, or add a step within the limits to the history."""
        loss, norm = outcome.loss, outcome.grad_norm
        if not (math.isfinite(loss) and math.isfinite(norm)) or outcome.overflow:
            return Observation(state)
        highest = self._loss_limit(state), self._norm_limit(state)
        signals = self._beyond(state, loss, norm, *highest)
        if signals:
            return self._outlier(state, outcome, signals)
        if outcome.skipped:  # another rule dropped it
            return Observation(state)
        return Observation(self._learn(state, loss, norm, *highest))

    def rebase(self, state: OutlierState, cause: str) -> OutlierState:
        """The history at the snapshot, with all counts reset."""
        return _without_counts(state)

    def accept_level(self, state: OutlierState, losses: Sequence[float], norms: Sequence[float]) -> OutlierState:
        """Learn the level of these steps; up to its limits, later steps are not outliers."""
        loss, norm = self._loss.accept(state.loss, losses), self._norm.accept(state.norm, norms)
        return _without_counts(state)._replace(loss=loss, norm=norm)

    # ---- the history ------------------------------------------------------------------------------------------------

    def _learn(
        self, state: OutlierState, loss: float, norm: float, loss_limit: float, norm_limit: float
    ) -> OutlierState:
        level, candidates, outside = state.norm, state.candidates, state.outside
        if norm > 0.0:
            if candidates:
                # an accepted norm near the limit does not discard the candidates: after a shift of the level as far as
                # the limit, half of the steps would else be dropped until the window has filled
                raised = self._norm.is_raised(level, norm)
                candidates, outside = ((*candidates, norm)[-self.window :], outside) if raised else ((), 0)
            level = self._norm.learn(level, norm)
        share = state.share
        if share is not None:
            # not only outliers: where what recurs lies about at the limit, it would be forgotten while the limit is
            # a little higher, and dropped when it is lower again
            raised = norm_limit < math.inf and self._norm.is_raised(state.norm, norm)
            raised = raised or (loss_limit < math.inf and self._loss.is_raised(state.loss, loss))
            share += (raised - share) / _SHARE_STEPS
        heat = state.heat
        if heat:
            heat = max(0.0, heat - _HEAT_LOST * (1.0 + _LOSS_PER_SHARE * _recurrent(state)))
        state = OutlierState(self._loss.learn(state.loss, loss), level, 0, candidates, outside, heat, share)
        return state if share is not None else state._replace(share=self._first_share(state))

    def _first_share(self, state: OutlierState) -> float | None:
        """The share of raised steps in the later half of those before there was a limit; None while there is none."""
        shares = []
        if self._loss_limit(state) < math.inf:
            shares.append(self._loss.share_raised(state.loss))
        if self._norm_limit(state) < math.inf:
            shares.append(self._norm.share_raised(state.norm))
        return max(shares, default=None)

    def _outlier(self, state: OutlierState, outcome: Outcome, signals: list[_Beyond]) -> Observation[OutlierState]:
        loss, norm, in_a_row = outcome.loss, outcome.grad_norm, state.in_a_row + 1
        what = " and ".join(self._comparison(state, signal) for signal in signals)
        events: tuple[Event, ...] = ()
        share = state.share or 0.0
        if not outcome.skipped:
            share += (1.0 - share) / _SHARE_STEPS
        elif not self._tolerates(state) or signals[0].below:
            reason = f"{what}: step skipped ({in_a_row} in a row)"
            events = (Event(outcome.step, self.label, "skip", signals[0].value, signals[0].limit, reason),)

        heat = min(_MAX_HEAT, state.heat + 1.0)
        if self.keep_outliers:
            state = self._learn(state, loss, norm, self._loss_limit(state), self._norm_limit(state))
        elif signals[0].below or loss > self._high_loss(state):
            state = state._replace(candidates=(), outside=0)
        else:
            state = state._replace(candidates=(*state.candidates, norm)[-self.window :], outside=state.outside + 1)
        state = state._replace(in_a_row=in_a_row, heat=heat, share=share)
        if not self.keep_outliers and self.regime_after is not None and state.outside >= self.regime_after:
            state, event = self._relearn(state, outcome.step)
            events += (event,)
        if state.in_a_row < self.max_in_a_row:
            return Observation(state, events)
        reason = f"{in_a_row} outliers in a row (plugins.outliers.max_in_a_row={self.max_in_a_row}); last: {what}"
        request = Request(RequestKind.ROLLBACK, self.label, reason)
        return Observation(state._replace(in_a_row=0, candidates=(), outside=0), events, (request,))

    def _relearn(self, state: OutlierState, step: int) -> tuple[OutlierState, Event]:
        # accepted, not only learned: a level that alternates with another one is learned once
        level = self._norm.accept(state.norm, state.candidates)
        was, now, limit = self._norm.centre(state.norm), self._norm.centre(level), self._norm.limit(state.norm)
        reason = (
            f"grad_norm above {limit:.4g} in {state.outside} steps, the loss within its limit: "
            f"new level learned, {was:.4g} -> {now:.4g}"
        )
        state = OutlierState(state.loss, level, heat=state.heat, share=state.share)
        return state, Event(step, self.label, "regime", now, limit, reason)

    # ---- the outlier tests -------------------------------------------------------------------------------------------

    @cached_property
    def _loss(self) -> OutlierTest:
        return self._test(self.min_sigma_loss, log=False)

    @cached_property
    def _norm(self) -> OutlierTest:
        return self._test(self.min_sigma_norm, self.log_norm)

    def _test(self, min_sigma: float, log: bool) -> OutlierTest:
        return OutlierTest(self.sigmas, self.window, 0, self.min_samples, min_sigma, log, self.robust)

    def _tolerates(self, state: OutlierState) -> bool:
        """Whether an outlier is applied now."""
        return state.heat < self.tolerance * min(1.0 + _TOLERANCE_PER_SHARE * _recurrent(state), _MAX_TOLERANCE)

    def _beyond(
        self, state: OutlierState, loss: float, norm: float, loss_limit: float, norm_limit: float
    ) -> list[_Beyond]:
        """The signals that make a step an outlier; the loss is the first."""
        beyond = []
        if loss > loss_limit:
            beyond.append(_Beyond("loss", loss, loss_limit))
        elif self.robust and loss < (lowest := self._lowest_loss(state, loss_limit)):
            beyond.append(_Beyond("loss", loss, lowest, below=True))
        if norm > norm_limit:
            beyond.append(_Beyond("grad_norm", norm, norm_limit))
        return beyond

    def _high_loss(self, state: OutlierState) -> float:
        """A loss above it is raised, whether the loss has a limit or only tells what a raised norm means."""
        return self._loss.limit(state.loss, self._norm.rounding_size(state.norm) if self.robust else 0.0)

    def _loss_limit(self, state: OutlierState) -> float:
        """The limit of the loss; infinite if there is none."""
        return math.inf if self.signals == "grad_norm" else self._high_loss(state)

    def _norm_limit(self, state: OutlierState) -> float:
        return math.inf if self.signals == "loss" else self._norm.limit(state.norm)

    def _lowest_loss(self, state: OutlierState, limit: float) -> float:
        """A loss below it is absurd; ``limit`` is that of the loss."""
        return -math.inf if limit == math.inf else -_ABSURD * (abs(state.loss.centre) + limit - state.loss.centre)

    def _comparison(self, state: OutlierState, signal: _Beyond) -> str:
        test, baseline = (self._loss, state.loss) if signal.name == "loss" else (self._norm, state.norm)
        statistic, centre, steps = "median" if self.robust else "mean", test.centre(baseline), len(baseline.past.window)
        sign = "<" if signal.below else ">"
        return f"{signal.name} {signal.value:.4g} {sign} {signal.limit:.4g} ({statistic} {centre:.4g} of {steps} steps)"


def _recurrent(state: OutlierState) -> float:
    """The share of raised steps beyond what is common."""
    return max(0.0, (state.share or 0.0) - _COMMON_SHARE)


def _without_counts(state: OutlierState) -> OutlierState:
    return state._replace(in_a_row=0, candidates=(), outside=0, heat=0.0)
