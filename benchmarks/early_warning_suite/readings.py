"""The readings: what the monitors log at a step, one number for each kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple


class Reading(NamedTuple):
    """A number that may rise before the loss does.

    Args:
        key: in the record.
        name: in the tables.
        source: where a user gets it; empty: nowhere.
        published: a limit from the literature; None: there is none.
    """

    key: str
    name: str
    source: str = "monitor_activations"
    published: float | None = None


READINGS = (
    Reading("update", "update over weight, whole model", "monitor_gradients"),
    Reading("update_most", "update over weight, largest of a matrix", "monitor_gradients"),
    Reading("bound", "attention bound", published=100.0),
    Reading("logit", "largest attention logit", published=100.0),
    Reading("entropy", "1 / smallest attention entropy"),
    Reading("output", "largest output logit"),
    Reading("log_z", "output logsumexp"),
    Reading("rms", "activation RMS, largest of a layer"),
    Reading("largest", "largest activation"),
    Reading("zeros", "share of zeros, largest of a layer"),
    Reading("rms_t", "RMS_t, largest of a tensor", "monitor_gradients", published=2.3),
    Reading("spectral", "spectral norm, largest of a matrix", "monitor_gradients"),
    Reading("weight_norm", "weight norm", "monitor_gradients"),
    Reading("grad_norm", "gradient norm", "guard"),
    Reading("norm_slope", "slope of the gradient norm", ""),
    Reading("loss_change", "deviation of the loss's changes", ""),
    Reading("sharpness", "sharpness", "", published=1.0),
    Reading("loss_rise", "rise of the 10-step loss", ""),
)
"""All readings; a larger one is worse."""
FEW = frozenset({"sharpness"})
"""Readings of every 50th step."""
LINEAR = frozenset({"norm_slope"})
"""Readings that may be negative."""
_NO_ENTROPY = 1e-3
"""Added to an entropy, which may be 0."""

_LAYERS: Mapping[str, tuple[str, Callable[[Iterable[float]], float]]] = {
    "update_most": ("update_ratio", max),
    "bound": ("attention_bound", max),
    "logit": ("attention_logit", max),
    "entropy": ("attention_entropy", lambda each: 1 / (min(each) + _NO_ENTROPY)),
    "rms": ("activation_rms", max),
    "largest": ("activation_max", max),
    "zeros": ("zeros", max),
    "rms_t": ("rms_t", max),
    "spectral": ("spectral_norm", max),
    "weight_norm": ("weight_norm", lambda each: math.hypot(*each)),
}
"""By reading: the metric of layers, and how the layers become one number."""
_MODEL = {
    "loss": "stability/loss",
    "grad_norm": "stability/grad_norm",
    "update": "stability/update_ratio",
    "output": "stability/output_logit",
    "log_z": "stability/output_logz",
}
"""By reading: the metric of the whole model."""


def readings(metrics: Mapping[str, float]) -> dict[str, float]:
    """The readings of a step, and ``loss``.

    Args:
        metrics: that were logged at the step, by name.
    """
    found = {key: float(metrics[name]) for key, name in _MODEL.items() if name in metrics}
    for key, (name, join) in _LAYERS.items():
        prefix = f"stability_layers/{name}/"
        if values := [float(value) for each, value in metrics.items() if each.startswith(prefix)]:
            found[key] = join(values)
    return found
