"""A training on several ranks whose forward pass is observed, for `rank_pool.on_ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from plugins_on_ranks import sgd
from torch import Tensor
from two_ranks import NAN_AT, train

from stabletrain import MonitorActivations, MonitorGradients


class Read(NamedTuple):
    """The metrics of one rank, its weights, and those of a training without the monitors."""

    metrics: dict[str, float]
    weights: dict[str, Tensor]
    bare: dict[str, Tensor]


def readings(folder: Path, kind: str | None) -> Read:
    """Train with all readings, and without."""
    monitors = (MonitorActivations(every=1), MonitorGradients(1, update_ratio=True, spectral_norm=True))
    options = {"limit_train_batches": NAN_AT, "log_every_n_steps": NAN_AT}
    weights, trainer = train(folder, kind, *monitors, make_optimizer=sgd, **options)
    bare, _ = train(folder, kind, make_optimizer=sgd, **options)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("stability")}
    return Read(metrics, weights, bare)
