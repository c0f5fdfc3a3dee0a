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
"""Quantile of the history above which a step counts towards a change of level: one in twenty, by chance."""


class PercentileState(NamedTuple):
    """History of the norm.

    Args:
        window: the last raw norms.
        run: those of the current run of steps that are high for this window.
    """

    window: Window = Window()
    run: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClipPercentileRule(Rule[PercentileState]):
    """Hold the gradient norm to a percentile of its last ``window`` values.

    With the paper's 10th percentile some nine steps in ten are clipped, by design: close to a normalised gradient
    whose length follows the run. High percentiles (95) clip outliers only.

    Raw norms are learned, clipped or not. Zero norms and non-finite ones are neither learned nor clipped: a bound that
    became 0 would stay there. When ``regime_after`` steps in a row lie above the history's 95th percentile (or above
    ``percentile``, if that is higher), the level itself has changed, and is learned anew from them.

    Args:
        percentile: of the history, in percent, linearly interpolated, in [0, 100].
        window: steps that the history spans, >= 2.
        warmup_steps: steps that are only learned from, in [1, window].
        regime_after: steps in a row after which the level is learned anew, in [2, window]; None: never.

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
        """The percentile of the history; none during the warm-up."""
        if len(state.window) < self.warmup_steps:
            return NO_LIMITS
        threshold = state.window.quantile(self.percentile / 100.0)
        return Limits(frozenset((Bound(threshold, threshold),)))

    def observe(self, state: PercentileState, outcome: Outcome) -> Observation[PercentileState]:
        """Learn the raw norm."""
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
            f"level learned anew, median {old.median:.4g} -> {new.median:.4g}"
        )
        return Observation(PercentileState(new), (Event(step, self.label, "regime", new.median, high, reason),))
