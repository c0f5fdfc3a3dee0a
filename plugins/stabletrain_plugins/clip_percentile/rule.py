"""Clip by a percentile of the norm's own history (AutoClip, Seetharaman et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from stabletrain.core.events import Event
from stabletrain.core.limits import NO_LIMITS, Bound, Limits
from stabletrain.core.outcome import Outcome
from stabletrain.core.rule import Observation, Rule
from stabletrain.core.statistics import Window

_HIGH = 0.95
"""A norm above this quantile of the history counts towards a change of level; by chance that is one step in twenty."""


class PercentileState(NamedTuple):
    """History of the norm.

    Args:
        window: the last raw norms.
        run: norms of the consecutive steps, up to the last one, that were high for this window.
    """

    window: Window = Window()
    run: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClipPercentileRule(Rule[PercentileState]):
    """Clip the gradient norm to a percentile of its last ``window`` values.

    With the paper's 10th percentile about nine steps in ten are clipped, by design: the update is close to that of a
    normalised gradient. High percentiles (95) clip outliers only.

    The history holds raw norms, also of clipped steps. Zero and non-finite norms do not enter it and are not clipped: a
    bound of 0 would never rise again. After ``regime_after`` steps in a row above the history's 95th percentile (or
    above ``percentile``, if that is higher) the history is replaced by the norms of those steps.

    Args:
        percentile: of the history, in percent, linearly interpolated, in [0, 100].
        window: steps of history, >= 2.
        warmup_steps: first steps without a bound, in [1, window].
        regime_after: high steps in a row after which they replace the history, in [2, window]; None: never.

    Raises:
        UserError: if an argument is out of range.

    References:
        Seetharaman, Wichern, Pardo and Le Roux, AutoClip: Adaptive Gradient Clipping for Source Separation Networks,
        2020, https://arxiv.org/abs/2007.14469

    >>> from stabletrain.core.rule import replay
    >>> rule = ClipPercentileRule(percentile=50)
    >>> [step.outcome.applied_norm for step in replay(rule, [(2.0, 3.0), (2.0, 1.0), (2.0, 9.0), (2.0, 9.0)])]
    [3.0, 1.0, 2.0, 3.0]
    """

    plugin = "clip_percentile"
    slot = "clip"
    clips = True

    percentile: float = 10.0
    window: int = 500
    warmup_steps: int = 1
    regime_after: int | None = 20

    def __post_init__(self) -> None:
        self.require(0 <= self.percentile <= 100, "percentile", "in [0, 100]")
        self.require(self.window >= 2, "window", ">= 2")
        self.require(1 <= self.warmup_steps <= self.window, "warmup_steps", f"in [1, window={self.window}]")
        self.require(
            self.regime_after is None or 2 <= self.regime_after <= self.window,
            "regime_after",
            f"in [2, window={self.window}] or None",
        )

    def init(self) -> PercentileState:
        """An empty history."""
        return PercentileState()

    def limits(self, state: PercentileState) -> Limits:
        """A bound at the percentile of the history; no bound during the warm-up."""
        if len(state.window) < self.warmup_steps:
            return NO_LIMITS
        threshold = state.window.quantile(self.percentile / 100.0)
        return Limits(frozenset((Bound(threshold, threshold),)))

    def observe(self, state: PercentileState, outcome: Outcome) -> Observation[PercentileState]:
        """Add the raw norm to the history."""
        norm = outcome.grad_norm
        if not (0.0 < norm < math.inf and outcome.applied):
            return Observation(state)
        window = state.window
        run: tuple[float, ...] = ()
        if self.regime_after is not None and len(window) >= self.regime_after:
            high = window.quantile(max(_HIGH, self.percentile / 100.0))
            if norm > high:
                run = (*state.run, norm)
                if len(run) >= self.regime_after:
                    return self._relearn(window, high, run, outcome.step)
        return Observation(PercentileState(window.add(norm, self.window), run))

    def _relearn(self, old: Window, high: float, run: tuple[float, ...], step: int) -> Observation[PercentileState]:
        new = Window().extend(run)
        reason = (
            f"grad_norm above {high:.4g} for {len(run)} steps in a row: "
            f"new level learned, median {old.median:.4g} -> {new.median:.4g}"
        )
        return Observation(PercentileState(new), (Event(step, self.label, "regime", new.median, high, reason),))
