"""SkipOutliers in a fit: garbage batches leave no trace, and garbage that lasts stops the run."""

import pytest
from fits import HEALTHY, Batch, Net, assert_same, batches, everything, fit

from stabletrain import SkipOutliers
from stabletrain.runtime.stop import TrainingStopped

HEALTHY_RUN = batches(*[HEALTHY] * 60)


def garbage(steps: int) -> list[Batch]:
    """Batches a hundred times as large as the healthy ones."""
    return [(100 * x, fault) for x, fault in batches(*[HEALTHY] * steps, seed=1000)]


def test_a_garbage_batch_is_as_if_it_had_not_been_seen() -> None:
    """Bugs: a healthy step is dropped; a dropped step changes weights, statistics of the norms, or the optimizer."""
    plain = everything(fit(Net(), HEALTHY_RUN))
    options = {"window": 32, "min_samples": 16}
    assert_same(plain, everything(fit(Net(), HEALTHY_RUN, SkipOutliers(**options))))
    mixed = [*HEALTHY_RUN[:40], *garbage(2), *HEALTHY_RUN[40:]]
    assert_same(plain, everything(fit(Net(), mixed, SkipOutliers(**options))))


def test_lasting_garbage_is_a_clean_stop() -> None:
    """Bug: garbage is dropped for ever, or learned as the new level before ``max_in_a_row`` is reached."""
    with pytest.raises(TrainingStopped, match="8 outliers in a row"):
        fit(
            Net(),
            HEALTHY_RUN[:40] + garbage(20),
            SkipOutliers(window=32, min_samples=16, regime_after=4, max_in_a_row=8),
        )


def test_the_preset_is_a_callback_too() -> None:
    """Bug: a preset defined on the rule is missing on the callback, makes a rule, or ignores its arguments."""
    callback = SkipOutliers.olmo(name="mine")
    assert isinstance(callback, SkipOutliers)
    assert (callback.state_key, callback.robust) == ("mine", False)
