"""The project's own detectors of the loss, applied to the losses and gradient norms of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stabletrain.core.rule import Rule, replay
from stabletrain.core.slow_rise import SlowRise
from stabletrain_plugins.detect_spikes.rule import DetectSpikesRule
from stabletrain_plugins.skip_outliers.rule import SkipOutliersRule

Event = tuple[int, str]
"""Step and kind; the kind of a slow rise is ``slow rise``, that of a divergence by ``patience`` is ``divergence``."""


def detect_spikes(losses: Sequence[float], norms: Sequence[float]) -> list[Event]:
    """The events of `stabletrain.DetectSpikes` with its defaults."""
    return _events(DetectSpikesRule(), losses, norms)


def skip_outliers(losses: Sequence[float], norms: Sequence[float]) -> list[Event]:
    """The steps that `stabletrain.SkipOutliers` with its defaults would drop."""
    return [(step, kind) for step, kind in _events(SkipOutliersRule(), losses, norms) if kind == "skip"]


def slow_rise(losses: Sequence[float]) -> list[Event]:
    """The slow rises of the losses, and a loss that is not finite, by the rule alone without a test for outliers."""
    state, events = SlowRise(), list[Event]()
    for step, loss in enumerate(losses):
        if not math.isfinite(loss):
            events.append((step, "nonfinite"))
            continue
        state, rise = state.add(loss, step)
        if rise is not None:
            events.append((step, "slow rise"))
    return events


def _events(rule: Rule[object], losses: Sequence[float], norms: Sequence[float]) -> list[Event]:
    return [
        (event.step, "slow rise" if "risen slowly" in event.reason else event.kind)
        for step in replay(rule, zip(losses, norms, strict=True))
        for event in step.events
    ]
