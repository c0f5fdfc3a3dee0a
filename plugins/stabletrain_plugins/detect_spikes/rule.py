"""Report loss spikes and divergences, and measure how often they occur."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stabletrain.core.spikes import SPIKE_SCORE, SpikeDetection

METRICS = (SPIKE_SCORE,)


@dataclass(frozen=True, kw_only=True)
class DetectSpikesRule(SpikeDetection):
    """Report spikes, divergences, level shifts, non-finite steps, and a loss that does not fall; nothing else changes.

    Loss and raw gradient norm are compared with median ``m`` and scaled MAD ``s`` of the last ``window`` accepted
    steps, without the newest ``delay`` of them. A norm is an outlier above ``exp(m + z_threshold * s)`` of its
    logarithms, a loss above ``m + z_threshold * s`` or, where that is higher, above the limit of a log-normal or a
    long-tailed loss. A step is accepted if it is applied and finite and neither signal has an excursion: bursts and
    steps that another plugin skipped do not change the limits. An excursion begins with an outlier and ends when the
    signal falls below the midpoint of median and limit.

    * *spike*: an outlier of the loss or of the norm; one event per step.
    * *divergence*: an excursion of the loss that lasts ``patience`` steps. The event is repeated every ``patience``
      steps; after ``window`` steps the baseline is learned from the new level, so that later spikes are detected.
      Also a slow rise: the mean of the last 20 losses is, five steps in a row, above the lowest such mean by 6 standard
      errors and by 5 %. It is reported once, and again if the loss rises anew after it has come back.
    * *not_learning*: after a tenth of the run the loss has fallen neither by 2 % of its first value nor by 3 standard
      deviations. It is reported once, in runs of a known length of at least 100 steps.
    * *regime*: an excursion of the gradient norm alone that lasts ``regime_after`` steps. The baseline is learned from
      those steps.
    * *nonfinite*: loss or norm is NaN or infinite. It enters no baseline. Of consecutive steps that no plugin drops,
      only the first is reported, and those that request a rollback.

    The metric ``stability/spike_score`` is the share of flagged steps (outliers and non-finite ones) among the last
    ``score_window`` steps.

    Args:
        z_threshold: distance of the limit from the median, in robust standard deviations, > 0.
        window: steps of history, >= 2.
        delay: steps after which an accepted step enters the history, >= 0.
        min_samples: steps of history from which on there is a limit, 2 to ``window``; this takes ``delay`` steps more.
        patience: steps after which an excursion of the loss is a divergence, 1 to ``window``; also the number of
            consecutive non-finite steps after which ``on_divergence`` applies.
        regime_after: steps after which an excursion of the gradient norm alone is a new level, 2 to ``window``.
        min_sigma_norm: floor of the norm's standard deviation, in nats of its logarithm, > 0.
        min_sigma_loss: floor of the loss's standard deviation, as a share of its median, >= 0.
        score_window: steps over which ``stability/spike_score`` is computed, >= 1.
        expect: positions at which the training changes by design, such as ``[600, "3ep"]``: from there all rules learn
            their baselines anew. Applied steps, epochs or percent of the run, above 0; None: none.
        on_divergence: ``"report"``, or ``"rollback"``: also request a rollback, but not for a slow rise; if no plugin
            can roll back, the run stops cleanly.

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

    def requests_rollback(self) -> bool:
        """Whether a divergence requests a rollback."""
        return self.on_divergence == "rollback"
