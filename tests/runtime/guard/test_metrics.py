"""Means over the steps since the last flush: a NaN that reached the weights shows, one that was dropped does not."""

import math
from typing import Any

import pytest
from fits import HEALTHY, INF_GRAD, NAN_GRAD, NAN_LOSS, Net, Recorder, batches, fit
from lightning.pytorch.callbacks import EarlyStopping

from stabletrain import ClipNorm, Guard, SkipNonFinite
from stabletrain.core.outcome import Outcome
from stabletrain.runtime.guard.metrics import Counters, MetricsWindow

SOME = (HEALTHY, HEALTHY, NAN_LOSS, HEALTHY)


def shown(fault: int, *callbacks: Any, **options: Any) -> dict[str, float]:
    items = batches(*(fault if each == NAN_LOSS else HEALTHY for each in SOME))
    mine = fit(Net("adamw-fused", norm=False), items, *callbacks, log_every_n_steps=4, **options)
    return {key: float(value) for key, value in mine.callback_metrics.items()}


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize(("fault", "nonfinite"), [(NAN_LOSS, "loss"), (NAN_GRAD, "grad_norm"), (INF_GRAD, "grad_norm")])
def test_a_nonfinite_step_shows_unless_it_was_dropped(fault: int, nonfinite: str, mode: str) -> None:
    """Bugs: `loss` stays at the last finite mean while the weights are NaN; one dropped batch makes a mean NaN."""
    assert not math.isfinite(shown(fault, ClipNorm(), Guard(mode=mode))[f"stability/{nonfinite}"])
    dropped = shown(fault, SkipNonFinite(), Guard(mode=mode))
    assert math.isfinite(dropped[f"stability/{nonfinite}"])
    assert dropped["stability/skipped"] == 1


def test_an_overflow_of_the_scaler_does_not_show() -> None:
    """Bug: a mean of the gradient norm that is infinite whenever the loss scaler tries a larger scale."""
    metrics = shown(INF_GRAD, ClipNorm(), fp16=True)
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["stability/overflows"] == 1


def test_early_stopping_sees_a_nan() -> None:
    """Bug: `EarlyStopping(check_finite=True)` that never stops, because NaN is left out of what it monitors."""
    stop = EarlyStopping("stability/loss", patience=99, check_on_train_epoch_end=True)
    recorder = Recorder()
    fit(Net(norm=False), batches(*[NAN_LOSS] * 4), recorder, stop, max_epochs=5)
    assert len(recorder.state) == 4


@pytest.mark.parametrize("values", [(1.0, math.inf), (math.inf, -math.inf), (1e308, 1e308, -1e308), (math.nan, 1.0)])
def test_extreme_values_have_a_mean(values: tuple[float, ...]) -> None:
    """Bug: a ValueError or OverflowError of the summation ends the run."""
    window, counters = MetricsWindow(), Counters()
    for step, value in enumerate(values):
        window.add(Outcome(step, value, value, value, value))
    metrics = window.take(counters)
    if all(map(math.isfinite, values)):
        assert metrics["loss"] == pytest.approx(1e308 / 3)
    else:
        assert not math.isfinite(metrics["loss"])
