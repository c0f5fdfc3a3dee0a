"""Send the plugins' metrics to loggers, progress bar and ``callback_metrics``, under names that nobody else uses."""

from __future__ import annotations

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

from stabletrain.core import metric_names
from stabletrain.runtime.internals import trainer as trainer_internals
from stabletrain.runtime.records.event_log import logger

_told: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()
"""By Trainer, what it was warned of."""


def publish(
    trainer: Trainer, metrics: Mapping[str, float], shown: Mapping[str, float], step: int | None = None
) -> None:
    """Send metrics under their full names (`metric_names.full_name`); the same names on every rank.

    A name that the module logs itself is left to it, with one warning. In ``callback_metrics`` each value has its old
    names too, where nothing else has put a value; the progress bar shows short words, but none that the module shows.

    Args:
        trainer: in a fit.
        metrics: by short or full name.
        shown: metrics for the progress bar, by the words to show.
        step: for the loggers; None: the step in progress.
    """
    of_module = trainer_internals.logged_names(trainer)
    if taken := sorted(filter(metric_names.is_own, of_module)):
        _warn_once(
            trainer,
            "taken",
            f"the module or a callback logs {', '.join(taken)}: names with the prefix {metric_names.OWN} are those of "
            "stabletrain's metrics. Its values are kept, and metrics of stabletrain with the same name are not logged. "
            "To get both, log it under another name",
        )
    named = {metric_names.full_name(name): value for name, value in metrics.items()}
    named = {name: value for name, value in named.items() if name not in of_module}
    copies = {old: name for name in named for old in metric_names.old_names(name)[:1] if old not in of_module}
    theirs = trainer_internals.logged_names(trainer, progress_bar=True)
    words = {word: value for word, value in shown.items() if word not in theirs}
    trainer_internals.publish_metrics(trainer, named, words, copies)
    if trainer.is_global_zero:
        for each in trainer.loggers:
            each.log_metrics(named, step=trainer_internals.logger_step(trainer) if step is None else step)


def warn_of_old_names(trainer: Trainer) -> None:
    """Say once, for each callback and scheduler that monitors a metric by its old name, what the name is now."""
    if not trainer.is_global_zero or trainer.sanity_checking:
        return
    metrics = trainer.callback_metrics
    readers: list[tuple[str, object]] = [
        (type(each).__name__, getattr(each, "monitor", None))
        for each in trainer.callbacks  # type: ignore[attr-defined]
    ]
    readers += [(type(each.scheduler).__name__, each.monitor) for each in trainer.lr_scheduler_configs]
    for reader, monitor in readers:
        if isinstance(monitor, str) and (name := metric_names.in_use_by_old_name(monitor, metrics)):
            _warn_once(
                trainer,
                f"{reader} {monitor}",
                f"{reader} monitors {monitor!r}, a metric of stabletrain that is now called {name!r}: use "
                f"monitor={name!r}; the old name will be gone in version 0.2",
            )


def _warn_once(trainer: Trainer, key: str, message: str) -> None:
    told = _told.setdefault(trainer, set())
    if key not in told and trainer.is_global_zero:
        told.add(key)
        logger.warning(message)
