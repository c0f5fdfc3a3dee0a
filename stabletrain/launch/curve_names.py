"""Which metrics of a run hold the curves that are compared and judged: ours, then those that other tools log."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from stabletrain.core import metric_names

_HELD_OUT = r"val|eval|test|dev"
_PATTERNS: Mapping[str, tuple[str, ...]] = {
    "loss": (
        "stability/loss",
        *("train/loss", "train_loss", "training_loss", "loss"),
        *("train[/_]loss_step", "train[/_]loss_epoch"),
        rf"(?i)(?!.*({_HELD_OUT})).*loss.*",
    ),
    "val_loss": (
        *("val/loss", "val_loss"),
        r"(val|valid|validation|eval)[/_](loss|nll)(_epoch)?",
        r"(loss|nll)[/_](val|valid|validation|eval)",
    ),
    "grad_norm": ("stability/grad_norm", "grad_norm", "train/grad(ient)?_norm", "gradient_norm", "grad_.*_norm_total"),
    "lr": ("stability/lr", "(train/)?(lr|learning_rate)", r"lr-[\w./-]+"),
    "loss_scale": ("stability/loss_scale",),
}
"""Curve -> patterns of whole names, the surest first."""

CURVES = tuple(_PATTERNS)
"""The curves that are known."""


def names_of(curve: str, metrics: Iterable[str]) -> list[str]:
    """Return the metrics that may hold a curve, the surest first.

    Args:
        curve: one of `CURVES`.
        metrics: the names of a run's metrics.

    >>> names_of("loss", ["val/loss", "stability/spike_score", "my_loss", "loss"])
    ['loss', 'my_loss']
    >>> names_of("val_loss", ["loss", "eval_loss"]), names_of("lr", ["lr-AdamW", "lr"])
    (['eval_loss'], ['lr', 'lr-AdamW'])
    """
    known = sorted(metrics)
    found = [name for pattern in _PATTERNS[curve] for name in known if re.fullmatch(pattern, name)]
    ours = _PATTERNS[curve][0]
    return [name for name in dict.fromkeys(found) if name == ours or not metric_names.is_own(name)]
