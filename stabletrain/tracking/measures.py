"""The numbers by which runs are compared: final and best loss, spikes, skips, clipped share, speed, memory, time."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from stabletrain.runtime.records.steps_file import Flag, Steps

if TYPE_CHECKING:
    from stabletrain.tracking.series import Series

_SAME_SPIKE = 20
"""Steps within which outliers belong to one spike."""


class Measure(NamedTuple):
    """A column of a comparison.

    Args:
        key: its name in ``RunSummary.measures``.
        title: with the unit.
        note: what it is, for the line below the table; empty: the title says it.
    """

    key: str
    title: str
    note: str = ""


MEASURES = (
    Measure("final_loss", "final loss", "median of the last twentieth of the run"),
    Measure("best_loss", "best loss", "lowest median of a fiftieth of the run"),
    Measure("val_loss", "val loss", "last validation"),
    Measure("best_val_loss", "best val loss"),
    Measure("spikes", "spikes", "applied losses 6 robust standard deviations above the median of the 128 before"),
    Measure("nonfinite", "non-finite", "applied steps with a NaN or infinite loss or norm"),
    Measure("skipped", "skipped"),
    Measure("overflows", "overflows"),
    Measure("clipped_share", "clipped", "share of the steps"),
    Measure("rollbacks", "rollbacks"),
    Measure("batches_excluded", "batches excluded"),
    Measure("steps", "steps", "attempted"),
    Measure("tokens_per_s", "tokens/s", "median over the run"),
    Measure("samples_per_s", "samples/s", "median over the run"),
    Measure("peak_memory_mib", "peak memory"),
    Measure("wall_s", "wall time"),
)
"""All measures, in the order of the columns."""


def of_steps(steps: Steps) -> dict[str, float]:
    """Return what the record of every step says.

    A dropped step is no part of the losses: the model is as if its batch had never been seen.

    Args:
        steps: of one run.
    """
    import numpy as np

    attempted = len(steps.step)
    if not attempted:
        return {}
    has = {flag: (steps.flags & flag.value) != 0 for flag in Flag}
    applied = ~(has[Flag.SKIPPED] | has[Flag.OVERFLOW] | has[Flag.NO_LOSS])
    loss, norm = steps.loss[applied], steps.grad_norm[applied]
    measured = np.isfinite(steps.grad_norm).any()  # without plugins no norm is
    return {
        "steps": float(steps.step[-1] + 1),
        "nonfinite": float(np.count_nonzero(~np.isfinite(loss) | (measured & ~np.isfinite(norm)))),
        "skipped": float(np.count_nonzero(has[Flag.SKIPPED])),
        "overflows": float(np.count_nonzero(has[Flag.OVERFLOW])),
        "clipped_share": float(np.count_nonzero(has[Flag.CLIPPED])) / attempted,
    }


def of_series(series: Series, *, exact: bool) -> dict[str, float]:
    """Return the level of the loss at its end and at its best, and the number of spikes, as `report` finds them.

    Nothing for steps of several optimizers, whose losses have nothing to do with each other.

    Args:
        series: of one run, with at least one point.
        exact: whether each point is a step; a mean of several hides spikes.
    """
    import numpy as np

    from stabletrain.tracking.finding_rules import spikes

    if series.mixed:
        return {}
    found = levels(series)
    if exact:
        at = spikes(series)[0]
        found["spikes"] = float(np.count_nonzero(np.diff(at, prepend=-_SAME_SPIKE - 1) > _SAME_SPIKE))
    return found


def levels(series: Series) -> dict[str, float]:
    """Return the level of the loss at its end and at its best: medians, of single values in a run of few points.

    Args:
        series: of one run.
    """
    import numpy as np

    if series.curve is not None:
        end = series.curve.end if math.isfinite(series.curve.s[-1]) else math.nan
        return {"final_loss": end, "best_loss": series.curve.best}
    loss = series.loss[series.applied]
    finite = loss[np.isfinite(loss)]
    if not len(loss):
        return {}
    return {
        "final_loss": float(loss[-1]) if math.isfinite(loss[-1]) else math.nan,
        "best_loss": float(finite.min()) if len(finite) else math.nan,
    }


def shown(key: str, value: float | None) -> str:
    """Return a measure as text, with its unit where the title has none; ``-`` if it is not known.

    Args:
        key: of the measure.
        value: NaN is a value.

    >>> shown("final_loss", 1.23456), shown("clipped_share", 0.0123), shown("wall_s", 3725.0), shown("skipped", None)
    ('1.235', '1.23 %', '1 h 2 min', '-')
    >>> shown("peak_memory_mib", 2048.0), shown("spikes", 3.0), shown("steps", 1e6), shown("val_loss", math.nan)
    ('2 GiB', '3', '1,000,000', 'nan')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if key == "clipped_share":
        return f"{100 * value:.3g} %"
    if key == "wall_s":
        return _duration(value)
    if key == "peak_memory_mib":
        return f"{value / 1024:.3g} GiB" if value >= 1024 else f"{value:.3g} MiB"
    if key.endswith("_per_s"):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    if "loss" in key:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value == round(value) else f"{value:,.3g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
