"""One run: a setting and a seed, all readings at every step, and the record that is kept of it."""

from __future__ import annotations

import logging
import math
import tempfile
import time
import warnings
from collections.abc import Mapping
from typing import Any

import lightning as L
from json_lines import Record
from lightning.pytorch.loggers.logger import Logger

from early_warning_suite import detectors, judge
from early_warning_suite.readings import FEW, LINEAR, READINGS, readings
from early_warning_suite.settings import STEPS, Setting
from early_warning_suite.sharpness import sharpness
from early_warning_suite.training import Training, loader
from stabletrain import ClipNorm
from stabletrain.testing.trainer import quiet_trainer
from stabletrain_plugins.monitor_activations.callback import MonitorActivations
from stabletrain_plugins.monitor_gradients.callback import MonitorGradients

SHARPNESS_EVERY = 50
_HELD_OUT_STEP = 10**6
"""The batch of which the curvature is measured, always the same."""

Series = dict[str, list[float | None]]


def record(part: str, setting: Setting, seed: int, steps: int = STEPS) -> Record:
    """Train, and return what is kept: when the loss rose, and a summary of each reading.

    Args:
        part: ``calibration``, ``seen``, ``unseen`` or ``troubled``.
        setting: what is trained.
        seed: of weights and batches.
        steps: of the run; fewer for a te
    """
    begin = time.process_time()
    series = train(setting, seed, steps)
    losses, norms = ([math.nan if x is None else x for x in series[name]] for name in ("loss", "grad_norm"))
    series |= judge.from_losses(losses, norms)
    kept = {
        each.key: judge.summary(series[each.key], setting.start, few=each.key in FEW, linear=each.key in LINEAR)
        for each in READINGS
        if each.key in series
    }
    means = judge.means(losses)
    lowest = min(means[judge.MEAN_OF - 1 :], default=losses[0])
    return {
        **key(part, setting, seed),
        "steps": len(losses),
        "risen": judge.risen(losses, norms),
        "loss": [judge.rounded(x) for x in (losses[0], lowest, means[-1])],
        "detect_spikes": detectors.detect_spikes(losses, norms)[:20],
        "skip_outliers": detectors.skip_outliers(losses, norms)[:20],
        "slow_rise": detectors.slow_rise(losses)[:20],
        "readings": {name: summary._asdict() for name, summary in kept.items() if summary is not None},
        "seconds": round(time.process_time() - begin, 1),
    }


def key(part: str, setting: Setting, seed: int) -> Record:
    """Return what a record is known by; ``setup`` makes a run of a changed setting another one."""
    return {"part": part, "setting": setting.name, "seed": seed, "setup": setting.digest}


def train(setting: Setting, seed: int, steps: int = STEPS, monitored: bool = True) -> Series:
    """Train, and return ``loss``, ``grad_norm`` and all readings at every step; None where a step has no such reading.

    The run ends where the loss or the gradient norm is not finite.

    Args:
        setting: what is trained.
        seed: of weights and batches.
        steps: at mo
        monitored: False: without the monitors, for a comparison.
    """
    module = Training(setting, seed)
    rows = _Rows(module)
    monitors = [
        MonitorActivations(every=1, attention="exact"),
        MonitorGradients(every=1, update_ratio=True, rms_t=True, spectral_norm=True),
    ]
    clip = [ClipNorm(max_norm=setting.clip)] if setting.clip is not None else []
    callbacks = [*clip, *(monitors if monitored else [MonitorGradients(every=steps)])]
    with tempfile.TemporaryDirectory(prefix="early-warning-") as folder, _quiet():
        trainer = quiet_trainer(
            *callbacks,
            _Curvature(rows),
            max_steps=steps,
            max_epochs=1,
            logger=rows,
            log_every_n_steps=1,
            default_root_dir=folder,
        )
        trainer.fit(module, loader(steps))
    names = ["loss", "grad_norm", *(each.key for each in READINGS if any(each.key in row for row in rows.rows))]
    return {name: [row.get(name) for row in rows.rows] for name in dict.fromkeys(names)}


class _Rows(Logger):
    """Keeps the readings of each step, from the metrics that a user's logger gets."""

    name, version = "rows", 0

    def __init__(self, module: Training) -> None:
        super().__init__()
        self.module, self.rows = module, list[dict[str, float]]()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row for a step, when the guard logs it."""
        if "stability/loss" in metrics:
            self.rows.append(readings(metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """There are none."""


class _Curvature(L.Callback):
    """Measures the sharpness every 50 steps, and ends a run that is not finite."""

    def __init__(self, rows: _Rows) -> None:
        self.rows = rows

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the step and its metrics."""
        last = self.rows.rows[-1]
        if (batch_idx + 1) % SHARPNESS_EVERY == 0:
            inputs, targets = pl_module.clean_batch(_HELD_OUT_STEP)
            last["sharpness"] = sharpness(pl_module.net, lambda: pl_module.loss(inputs, targets), trainer.optimizers[0])
        if not (math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"])):
            trainer.should_stop = True


class _quiet(warnings.catch_warnings):
    """Without warnings and log lines."""

    def __enter__(self) -> Any:
        before = super().__enter__()
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        return before

    def __exit__(self, *details: Any) -> None:
        logging.disable(logging.NOTSET)
        super().__exit__(*details)
