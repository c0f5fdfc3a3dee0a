"""The worker's part of a sweep's trial: report the objective at each validation, and stop if it is no good.

The launcher names the study in the environment, not in run.yaml, so that the run can be repeated without the study.
"""

from __future__ import annotations

import json
import logging
import math
import os
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stabletrain.core import metric_names
from stabletrain.launch.study import TRIAL_ENV, open_storage
from stabletrain.runtime.stop import TrainingStopped

logger = logging.getLogger("stabletrain")


def trial_callback() -> PruneTrial | None:
    """Return the callback of the trial that the environment names; None outside a sweep."""
    text = os.environ.get(TRIAL_ENV)
    return PruneTrial(**json.loads(text)) if text else None


class PruneTrial(Callback):
    """Stop a trial whose objective is worse than the median of the earlier trials at the same step, or not finite.

    The objective is reported with the number of applied steps at each validation; in a run without validation, at each
    epoch's end. A study that cannot be reached is a warning, and the run goes on.

    Args:
        storage: address of the studies' database.
        study: its name.
        trial: id of the trial in the database.
        metric: name of the objective.
        startup: complete trials before the first that may be stopped.
    """

    def __init__(self, *, storage: str, study: str, trial: int, metric: str, startup: int = 5) -> None:
        self._storage, self._study, self._trial, self._metric = storage, study, trial, metric
        self._startup = startup
        self._last_step = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, unless this is the check before training."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._report(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report in a run without validation."""
        if not trainer.enable_validation:
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        reason: str | None = None
        if trainer.is_global_zero:
            reason = self._reason(trainer)
        reason = trainer.strategy.broadcast(reason)
        if reason:
            raise TrainingStopped("sweep", reason)

    def _reason(self, trainer: Trainer) -> str | None:
        """Why the trial is no good; None if it may go on. On the first rank only, which alone opens the database."""
        step, value = trainer.global_step, self._value(trainer)
        if value is None or step == self._last_step:
            return None
        self._last_step = step
        try:
            import optuna

            storage = open_storage(self._storage)
            storage.set_trial_intermediate_value(self._trial, step, value)
            study = optuna.load_study(study_name=self._study, storage=storage)
            pruner = optuna.pruners.MedianPruner(n_startup_trials=self._startup)
            is_worse = pruner.prune(study, storage.get_trial(self._trial))
        except Exception as error:  # whatever the database raises: the run matters more
            logger.warning("the trial's study cannot be reached, and the run goes on: %s", error)
            return None if math.isfinite(value) else f"{self._metric} is {value} at step {step}"
        if not math.isfinite(value):
            return f"{self._metric} is {value} at step {step}"
        return f"{self._metric} {value:.4g} at step {step} is worse than the median of the trials" if is_worse else None

    def _value(self, trainer: Trainer) -> float | None:
        metrics: dict[str, Any] = metric_names.without_old_names(trainer.callback_metrics)
        name = metric_names.find(self._metric, metrics)
        return None if name is None else float(metrics[name])
