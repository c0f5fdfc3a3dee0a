"""Clip by the z-score of the gradient norm against its own history (ZClip, Kumar et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from stabletrain.core.events import Event
from stabletrain.core.limits import Bound, Limits
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule
from stabletrain.core.statistics import MAD_TO_SIGMA, Ema, Window
from stabletrain.errors import UserError
from stabletrain.settings import worded

_OUTLIER = 5.0
"""Distance from the median, in robust standard deviations of the logarithms, beyond which a norm is excluded from a new
baseline."""
_OUTLIER_SIGMA = 0.05
"""Floor of that standard deviation: a norm within 28 % of the median always enters the baseline."""
_RISE = 0.5
"""Nats by which one high norm raises the threshold; see `ClipZScoreRule`."""
_WARMUP_WINDOW = 5
"""Number of norms from which the limit of the warm-up is computed. It follows the norm, which usually falls in the
first steps; the second lowest is not raised by early instability of every other step."""
_LARGEST = 1e150
"""Norms up to this value have finite squares; larger ones are not learned."""


class ZScoreState(NamedTuple):
    """History of the norm.

    Args:
        ema: mean and variance of the norm, or of its logarithm; None during the warm-up.
        samples: norms of the warm-up; after it, norms of the consecutive steps, up to the last one, that were beyond
            the same limit.
        side: the limit that these steps were beyond: 1 the upper, -1 the lower, 0 none.
        raised: nats by which the threshold is raised, because single norms exceeded it.
    """

    ema: Ema | None = None
    samples: tuple[float, ...] = ()
    side: int = 0
    raised: float = 0.0


@dataclass(frozen=True)
class ClipZScoreRule(Rule[ZScoreState]):
    """Clip a gradient whose norm lies more than ``z_threshold`` standard deviations above its moving mean.

    Mean and standard deviation are exponential moving statistics of ``s = log(norm)`` (or of the norm itself). A norm
    with ``s > mean + z_threshold * std`` is clipped to ``target``. A clipped step enters the statistics with its norm
    *after* this clipping, so an outlier changes them little. With ``target="threshold"`` this limits the share of
    clipped steps in any stationary sequence to about ``1 / z_threshold**2``, as more of them would raise the variance.
    After ``regime_after`` steps in a row above the limit, mean and std are learned from those steps alone. In log space
    the same is done below ``mean - z_threshold * std``, where nothing is clipped.

    A single high norm that comes back now and then may be a rare class or domain; it is never learned if it is always
    clipped to the norm of the common ones. Therefore the threshold follows the ``1 - recurrent`` quantile of
    single norms: each step above it, whose previous step was within the limit, raises the threshold by half a nat (to
    that norm at most), each other step lowers it by ``recurrent`` times that, down to ``mean + z_threshold * std``. In
    the long run about a share ``recurrent`` of the steps is clipped; more where high norms are all alike, but by
    little. Mean and std learn what would be clipped without the rise. In the warm-up, from the sixth step on, a norm is
    clipped to ``warmup_factor`` times the second lowest of the last five norms.

    Zero and non-finite norms never enter the statistics, and are never clipped.

    Args:
        z_threshold: standard deviations above the mean at which clipping begins, > 0.
        decay: weight of the past in mean and variance, per step, in (0, 1).
        warmup_steps: first steps, in which only ``warmup_factor`` and ``max_norm`` clip, >= 2; outliers among them do
            not enter the first statistics.
        warmup_factor: in the warm-up, factor on the second lowest of the last five norms, to which a norm is clipped,
            > 1; None: no limit.
        recurrent: share of steps with a single high norm that is clipped in the long run, in [0, 1), in log space; 0:
            the threshold is never raised.
        space: space of the statistics: ``"log"`` or ``"linear"``.
        target: what a norm is clipped to: the ``"threshold"``; the ``"mean"``; or ``"reciprocal"``,
            ``mean + (z_threshold * std)**2 / (s - mean)``: the threshold for a small excess, near the mean for a large.
        clip_factor: factor on the norm that ``target`` gives, > 0.
        max_norm: additional fixed maximum, also during the warm-up, > 0; None: none.
        regime_after: steps in a row beyond a limit after which mean and std are learned from them, >= 2; None: never.
        min_sigma: floor of the standard deviation, as a share of the norm (in log space: in nats), > 0.
        learn_from_clipped: let clipped steps enter the statistics, with the clipped norm; else ignore them.

    Raises:
        UserError: if an argument is out of range.

    References:
        Kumar, Owen, Chowdhury and Güra, ZClip: Adaptive Spike Mitigation for LLM Pre-Training, 2025,
        https://arxiv.org/abs/2504.02507

    >>> from stabletrain.core.rule import replay
    >>> rule = ClipZScoreRule(warmup_steps=4)
    >>> norms = [1.0, 1.1, 0.9, 1.0, 1.05, 50.0, 1.0]
    >>> [round(step.outcome.applied_norm, 2) for step in replay(rule, [(2.0, g) for g in norms])]
    [1.0, 1.1, 0.9, 1.0, 1.05, 1.23, 1.0]
    """

    plugin = "clip_zscore"
    slot = "clip"
    clips = True

    z_threshold: float = 3.0
    decay: float = 0.98
    warmup_steps: int = 50
    warmup_factor: float | None = 2.0
    recurrent: float = 0.002
    space: Literal["log", "linear"] = "log"
    target: Literal["threshold", "mean", "reciprocal"] = "threshold"
    clip_factor: float = 1.0
    max_norm: float | None = None
    regime_after: int | None = 20
    min_sigma: float = 0.05
    learn_from_clipped: bool = True

    def __post_init__(self) -> None:
        self.require(0 < self.z_threshold < math.inf, "z_threshold", "> 0 and finite")
        self.require(0 < self.decay < 1, "decay", "in (0, 1)")
        self.require(self.warmup_steps >= 2, "warmup_steps", ">= 2")
        self.require(
            self.warmup_factor is None or 1 < self.warmup_factor < math.inf, "warmup_factor", "> 1 and finite, or None"
        )
        self.require(0 <= self.recurrent < 1, "recurrent", "in [0, 1)")
        self.require(self.space in ("log", "linear"), "space", '"log" or "linear"')
        self.require(
            self.target in ("threshold", "mean", "reciprocal"), "target", '"threshold", "mean" or "reciprocal"'
        )
        self.require(0 < self.clip_factor < math.inf, "clip_factor", "> 0 and finite")
        self.require(self.max_norm is None or self.max_norm > 0, "max_norm", "> 0 or None")
        self.require(self.regime_after is None or self.regime_after >= 2, "regime_after", ">= 2 or None")
        self.require(0 < self.min_sigma < math.inf, "min_sigma", "> 0 and finite")

    @classmethod
    def zclip(
        cls,
        *,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        max_grad_norm: float | None = 1.0,
        warmup_steps: int = 25,
        mode: Literal["zscore", "percentile"] = "zscore",
        clip_option: Literal["adaptive_scaling", "mean"] = "adaptive_scaling",
        clip_factor: float = 1.0,
        skip_update_on_spike: bool = False,
        regime_after: int | None = 20,
        name: str | None = None,
    ) -> Self:
        """ZClip with its published argument names and defaults, and with three corrections.

        Unlike in the reference, non-finite norms do not enter the statistics, outliers in the warm-up are excluded, and
        a new level is learned. With ``regime_after=None`` every step at a higher level is clipped, as in the reference.

        Args:
            alpha: `decay`, in (0, 1).
            z_thresh: `z_threshold`, > 0.
            max_grad_norm: `max_norm`, > 0 or None.
            warmup_steps: first steps, in which only `max_norm` clips, >= 2.
            mode: ``"zscore"`` clips according to `clip_option`, ``"percentile"`` to ``mean + z_thresh * std``.
            clip_option: in mode zscore: ``"adaptive_scaling"`` is the target ``"reciprocal"``, ``"mean"`` the mean.
            clip_factor: factor on the clipped norm, > 0; with adaptive scaling only.
            skip_update_on_spike: exclude clipped steps from the statistics.
            regime_after: as in the constructor; not in the reference.
            name: as in the constructor.

        Raises:
            UserError: if an argument is out of range or has no meaning in this mode.
        """
        if mode not in ("zscore", "percentile") or clip_option not in ("adaptive_scaling", "mean"):
            message = (
                'clip_zscore: zclip() expects mode "zscore" or "percentile", and clip_option "adaptive_scaling" or '
                f'"mean"; got mode={mode!r} and clip_option={clip_option!r} (config keys plugins.clip.mode and '
                "plugins.clip.clip_option)"
            )
            raise UserError(worded(message, cls.slot, cls.__name__.removesuffix("Rule")))
        adaptive = mode == "zscore" and clip_option == "adaptive_scaling"
        if clip_factor != 1.0 and not adaptive:
            message = (
                f"clip_zscore: clip_factor={clip_factor} has no effect with mode={mode!r} and "
                f"clip_option={clip_option!r}, only with 'zscore' and 'adaptive_scaling': set it to 1.0 "
                "(config key plugins.clip.clip_factor)"
            )
            raise UserError(worded(message, cls.slot, cls.__name__.removesuffix("Rule")))
        return cls(
            z_threshold=z_thresh,
            decay=alpha,
            warmup_steps=warmup_steps,
            warmup_factor=None,
            recurrent=0.0,
            space="linear",
            target="reciprocal" if adaptive else ("mean" if mode == "zscore" else "threshold"),
            clip_factor=clip_factor,
            max_norm=max_grad_norm,
            regime_after=regime_after,
            min_sigma=1e-6,
            learn_from_clipped=not skip_update_on_spike,
            name=name,
        )

    def init(self) -> ZScoreState:
        """The state at the start of the warm-up."""
        return ZScoreState()

    def limits(self, state: ZScoreState) -> Limits:
        """The z-score bound, in the warm-up the bound by the last norms, and the fixed maximum (if set)."""
        bounds: tuple[Bound, ...] = ()
        if state.ema is not None:
            bounds = (_risen(self._bound(state.ema), state.raised),)
        elif self.warmup_factor is not None and len(state.samples) >= _WARMUP_WINDOW:
            largest = self.warmup_factor * sorted(state.samples[-_WARMUP_WINDOW:])[1]
            bounds = (Bound(largest, largest),)
        if self.max_norm is not None:
            bounds += (Bound(self.max_norm, self.max_norm),)
        return Limits(frozenset(bounds))

    def observe(self, state: ZScoreState, outcome: Outcome) -> Observation[ZScoreState]:
        """Update mean and std with the norm as this rule alone would have clipped it."""
        norm = outcome.grad_norm
        if not (0.0 < norm < _LARGEST and outcome.applied):
            return Observation(state)
        ema = state.ema
        if ema is None:
            samples = (*state.samples, norm)
            full = len(samples) >= self.warmup_steps
            return Observation(ZScoreState(self._baseline(samples)) if full else ZScoreState(None, samples))
        bound = self._bound(ema)
        s, threshold = self._to_space(norm), bound.threshold
        raised = self._raise(state, norm, bound, threshold)
        if norm > threshold:
            side = 1
            learned = self._to_space(bound.clip(norm)) if self.learn_from_clipped else math.nan
        elif self.space == "log" and s < ema.mean and s < (lowest := ema.mean - self._margin(ema)):
            side = -1
            learned = lowest
        else:
            return Observation(ZScoreState(ema.add(s, self.decay), raised=raised))
        run = (*state.samples, norm) if side == state.side else (norm,)
        if self.regime_after is not None and len(run) >= self.regime_after:
            return self._relearn(ema, run, side, outcome.step)
        samples = run if self.regime_after is not None else ()
        return Observation(ZScoreState(ema.add(learned, self.decay), samples, side, raised))

    def accept_level(self, state: ZScoreState, losses: Sequence[float], norms: Sequence[float]) -> ZScoreState:
        """Learn these norms if they are higher: while steps were dropped, this rule learned nothing."""
        known = tuple(norm for norm in norms if 0.0 < norm < _LARGEST)
        if state.ema is None or not known:
            return state
        new = self._baseline(known)
        return ZScoreState(new) if new.mean > state.ema.mean else state

    def _raise(self, state: ZScoreState, norm: float, bound: Bound, threshold: float) -> float:
        """The rise of the threshold after a step with this norm; ``bound`` and its threshold are without a rise."""
        if not self.recurrent or self.space != "log" or state.ema is None:
            return 0.0
        if norm > threshold and state.side != 1 and norm > _risen(bound, state.raised).threshold:
            return max(state.raised, min(state.raised + _RISE, math.log(norm) - bound.above))  # max: for rounding
        return max(0.0, state.raised - _RISE * self.recurrent)

    def _relearn(self, old: Ema, run: tuple[float, ...], side: int, step: int) -> Observation[ZScoreState]:
        new = self._baseline(run)
        limit, was, now = (self._from_space(s) for s in (old.mean + side * self._margin(old), old.mean, new.mean))
        where = "above" if side > 0 else "below"
        reason = (
            f"grad_norm {where} {limit:.4g} for {len(run)} steps in a row: new level learned, {was:.4g} -> {now:.4g}"
        )
        return Observation(ZScoreState(new), (Event(step, self.label, "regime", now, limit, reason),))

    def _baseline(self, norms: tuple[float, ...]) -> Ema:
        """Mean and variance of norms, without those far from the median."""
        logs = Window().extend(math.log(norm) for norm in norms)
        farthest = _OUTLIER * max(MAD_TO_SIGMA * logs.mad, _OUTLIER_SIGMA)
        return Ema.from_moments(self._to_space(norm) for norm in norms if abs(math.log(norm) - logs.median) <= farthest)

    def _bound(self, ema: Ema) -> Bound:
        mean, margin = ema.mean, self._margin(ema)
        log = self.space == "log"
        target = mean + margin if self.target == "threshold" else mean
        pull = margin * margin if self.target == "reciprocal" else 0.0
        if self.clip_factor != 1.0:
            if log:
                target += math.log(self.clip_factor)
            else:
                target, pull = self.clip_factor * target, self.clip_factor * pull
        return Bound(mean + margin, target, pull, mean if pull else 0.0, log)

    def _margin(self, ema: Ema) -> float:
        """Distance of the limits from the mean."""
        least = self.min_sigma if self.space == "log" else self.min_sigma * ema.mean
        return self.z_threshold * max(math.sqrt(ema.var), least)

    def _to_space(self, norm: float) -> float:
        return math.log(norm) if self.space == "log" else norm

    def _from_space(self, s: float) -> float:
        return math.exp(s) if self.space == "log" else s


def _risen(bound: Bound, rise: float) -> Bound:
    """A bound whose threshold has risen."""
    return bound._replace(above=bound.above + rise, target=bound.target + rise) if rise else bound
