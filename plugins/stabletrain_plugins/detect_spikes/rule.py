"""Report loss spikes and divergences, and measure how often steps stand out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stabletrain.core.spikes import SpikeDetection


@dataclass(frozen=True, kw_only=True)
class DetectSpikesRule(SpikeDetection):
    """Report spikes, divergences and non-finite steps, as three different things; change nothing about the training.

    Loss and raw gradient norm are held against their recent past: median ``m`` and scaled MAD ``s`` of the last
    ``window`` accepted steps, those of the last ``delay`` steps not yet among them. A norm is an outlier above
    ``exp(m + z_threshold * s)`` of its logarithms, a loss above ``m + z_threshold * s`` or, where that is higher, the
    limit of a log-normal loss. Accepted are applied, finite steps with both signals inside, so that neither a
    burst nor a step that another plugin skipped can hide what follows.

    * *spike*: outside, then back. Each step outside is an event.
    * *divergence*: the loss is not back within ``patience`` steps. It is said again every ``patience`` steps, and after
      ``window`` steps the level is learned anew: whoever only watches has to go on watching.
    * *regime*: the gradient norm alone stays outside for ``regime_after`` steps. It has a new level, which is learned
      from those steps.
    * *nonfinite*: loss or norm is NaN or infinite. It enters no baseline.

    The metric ``spike_score`` is the share of flagged steps (outliers and non-finite ones) among the last
    ``score_window``.

    Args:
        z_threshold: robust standard deviations above the centre at which outliers begin, > 0.
        window: steps of history, >= 2.
        delay: steps that an accepted step waits before it counts as history, >= 0.
        min_samples: steps in the window before anything is judged, 2 to ``window``; ``delay`` more have then passed.
        patience: steps outside after which a raised loss is a divergence, 1 to ``window``; also non-finite steps in a
            row after which ``on_divergence`` applies.
        regime_after: steps outside after which the gradient norm has a new level, 2 to ``window``.
        min_sigma_norm: floor of the norm's standard deviation, in nats of its logarithm, > 0.
        min_sigma_loss: floor of the loss's standard deviation, as a share of its median, >= 0.
        score_window: steps that ``spike_score`` looks back, >= 1.
        on_divergence: ``"report"``, or ``"rollback"``: ask for a rollback too, which where no plugin can roll back is a
            clean stop.

    Raises:
        UserError: if an argument is out of range.

    References:
        OLMo et al., 2 OLMo 2 Furious, 2025, https://arxiv.org/abs/2501.00656 (spike score). Chowdhery et al., PaLM,
        2022, https://arxiv.org/abs/2204.02311 (spikes rolled back by hand). Leys et al., Detecting outliers: do not
        use standard deviation around the mean, use absolute deviation around the median, 2013,
        https://doi.org/10.1016/j.jesp.2013.03.013

    >>> from stabletrain.core.rule import replay
    >>> rule = DetectSpikesRule(window=8, delay=2, min_samples=4, patience=4, regime_after=4)
    >>> losses = [2.0, 2.1, 1.9, 2.0, 2.1, 2.0, 7.0, 2.0, 7.0, 7.1, 7.2, 7.3, 2.0]
    >>> [event.kind for step in replay(rule, [(loss, 1.0) for loss in losses]) for event in step.events]
    ['spike', 'spike', 'spike', 'spike', 'divergence']
    """

    plugin = "detect_spikes"
    slot = "spike"

    on_divergence: Literal["report", "rollback"] = "report"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.on_divergence in ("report", "rollback"), "on_divergence", '"report" or "rollback"')

    def asks(self) -> bool:
        """Whether a divergence becomes a request for a rollback."""
        return self.on_divergence == "rollback"
