"""The numbers by which runs are compared."""

import math
from typing import Any

import numpy as np
import pytest

from stabletrain.runtime.records.steps_file import Flag, Steps
from stabletrain.tracking.measures import levels, of_series, of_steps
from stabletrain.tracking.series import Rollback, Series


def steps_of(loss: np.ndarray, flags: np.ndarray | None = None, norm: float = 1.0) -> Steps:
    recorded = np.full(len(loss), Flag.RECORDED.value, np.uint8) if flags is None else flags
    return Steps(np.arange(len(loss)), loss, np.full(len(loss), norm), recorded)


def series_of(loss: np.ndarray, flags: np.ndarray | None = None, **others: Any) -> Series:
    steps = steps_of(loss, flags)
    marks = {"skipped": Flag.SKIPPED, "overflow": Flag.OVERFLOW, "without_loss": Flag.NO_LOSS}
    counts = {key: np.where(steps.flags & flag.value, 1.0, 0.0) for key, flag in marks.items()}
    return Series(step=steps.step, loss=loss, **counts, **others)


def numbers(loss: np.ndarray, flags: np.ndarray | None = None, **others: Any) -> dict[str, float]:
    return of_steps(steps_of(loss, flags)) | of_series(series_of(loss, flags, **others), exact=True)


def falling(count: int = 1000) -> np.ndarray:
    return 1 + 3 * np.exp(-np.arange(count) / (count / 5)) + np.random.default_rng(0).normal(0, 0.05, count)


def test_a_dropped_step_is_no_part_of_the_loss():
    """Bugs: the NaN of a dropped step is the final loss, or a spike; steps without a loss, and overflows, count as
    non-finite; the share of clipped steps is that of the applied ones."""
    loss, flags = falling(), np.full(1000, 1, np.uint8)
    loss[[500, 999]], flags[[500, 999]] = (50.0, math.nan), Flag.RECORDED | Flag.SKIPPED
    loss[600], flags[600] = math.nan, Flag.RECORDED | Flag.SKIPPED | Flag.NO_LOSS
    loss[700], flags[700] = math.inf, Flag.RECORDED | Flag.OVERFLOW
    flags[:250] |= Flag.CLIPPED.value
    found = numbers(loss, flags)
    assert abs(found["final_loss"] - 1.02) < 0.03
    counted = {key: found[key] for key in ("spikes", "nonfinite", "skipped", "overflows", "clipped_share", "steps")}
    assert counted == {"spikes": 0, "nonfinite": 0, "skipped": 3, "overflows": 1, "clipped_share": 0.25, "steps": 1000}
    assert of_steps(steps_of(np.array([]))) == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_value_that_is_not_finite(bad, place):
    """Bug: a single NaN or infinity that was applied, at whatever place, is the final or the best loss of the run."""
    loss = falling()
    loss[place] = bad
    found = numbers(loss)
    assert abs(found["final_loss"] - 1.02) < 0.03
    assert 0.9 < found["best_loss"] <= found["final_loss"]
    assert found["nonfinite"] == 1


def test_a_norm_that_nobody_measured_is_not_non_finite():
    """Bug: every step of a run without plugins counts as non-finite."""
    assert of_steps(steps_of(falling(), norm=math.nan))["nonfinite"] == 0


def test_an_end_that_is_not_finite():
    """Bug: a run that ends in NaN has the last finite loss as its final one."""
    loss = falling()
    loss[950:] = math.nan
    assert math.isnan(levels(series_of(loss))["final_loss"])
    assert levels(series_of(loss))["best_loss"] > 0.9
    assert math.isnan(levels(series_of(np.full(3, math.nan)))["best_loss"])


def test_spikes():
    """Bugs: a spike of thirty steps counts thirty times; two that are apart count as one; the steep fall of the start,
    noise, or a loss that hardly varies, is one; so is a rise that was announced, or that a rollback has undone."""

    def spikes(loss: np.ndarray, **others: Any) -> float:
        return numbers(loss, **others)["spikes"]

    loss = falling(3000)
    assert spikes(loss) == 0
    loss[1000:1030] += 3
    loss[2000] += 3
    loss[2999] += 3
    assert spikes(loss) == 3
    assert spikes(loss, rollbacks=[Rollback(1040, 990)]) == 2
    loss[[1500, 1501]] = math.nan
    assert spikes(loss) == 3
    higher = falling(3000)
    higher[1500:] += 3
    assert spikes(higher) == 1
    assert spikes(higher, changes=[1500]) == 0
    flat = np.full(1000, 2.0)
    flat[500] = 2.001
    assert spikes(flat) == 0
    assert spikes(falling(100)) == 0
    assert of_series(series_of(falling(), mixed=True), exact=True) == {}
