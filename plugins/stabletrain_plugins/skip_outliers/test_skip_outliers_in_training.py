"""SkipOutliers in a fit: dropped batches leave no trace, a tolerated one is clipped, and lasting garbage is a stop."""

from pathlib import Path
from typing import Any

import pytest
from fits import HEALTHY, Batch, Net, Recorder, assert_same, batches, everything, fit, loader
from lightning.pytorch import Callback

from stabletrain import ClipNorm, Guard, SkipOutliers
from stabletrain.runtime.stop import TrainingStopped

HEALTHY_RUN = batches(*[HEALTHY] * 60)
SHORT: dict[str, Any] = {"window": 32, "min_samples": 16}


def garbage(steps: int) -> list[Batch]:
    """Batches a hundred times as large as the healthy ones."""
    return [(100 * x, fault) for x, fault in batches(*[HEALTHY] * steps, seed=1000)]


def test_a_garbage_batch_is_as_if_it_had_not_been_seen() -> None:
    """Bugs: a healthy step is dropped; a dropped step changes weights, statistics of the norms, or the optimizer."""
    plain = everything(fit(Net(), HEALTHY_RUN))
    for tolerance in (0.0, 1.0):
        assert_same(plain, everything(fit(Net(), HEALTHY_RUN, SkipOutliers(tolerance=tolerance, **SHORT))))
    mixed = [*HEALTHY_RUN[:40], *garbage(2), *HEALTHY_RUN[40:]]
    assert_same(plain, everything(fit(Net(), mixed, SkipOutliers(tolerance=0.0, **SHORT))))


@pytest.mark.parametrize("mode", ["exact", "device"])
@pytest.mark.parametrize("max_norm", [None, 2.0, 300.0])
def test_the_first_of_two_garbage_batches_is_applied_as_clipped(max_norm: float | None, mode: Any) -> None:
    """Bugs: without a clipper the first is applied at its full length; with one, tighter or looser, it is held to this
    rule's limit; host and device hold to different norms; the order of the callbacks matters."""
    mixed, ends = [*HEALTHY_RUN[:40], *garbage(2), *HEALTHY_RUN[40:]], []
    for turn in (1, -1):
        recorder, rule = Recorder(), SkipOutliers(**SHORT)
        clipper = [] if max_norm is None else [ClipNorm(max_norm=max_norm)]
        members = [rule, *clipper, recorder, Guard(mode=mode)][::turn]
        ends.append(everything(fit(Net("adamw-fused"), mixed, *members)))
        outcomes, state = recorder.state, rule.rule.init()
        assert [outcome.step for outcome in outcomes if outcome.skipped] == [41]
        for outcome in outcomes[:40]:
            state = rule.rule.observe(state, outcome).state
        (bound,) = rule.rule.limits(state).fallback
        expected = bound.target if max_norm is None else max_norm
        assert outcomes[40].grad_norm > 300.0 > bound.target
        assert outcomes[40].applied_norm == pytest.approx(expected, rel=1e-6)
    assert_same(*ends)


def test_resumed_within_a_burst_of_which_the_first_was_applied(tmp_path: Path) -> None:
    """Bug: the resumed run, which has not seen the first of a burst, applies the second one too."""
    mixed = [*HEALTHY_RUN[:40], *garbage(3), *HEALTHY_RUN[40:]]

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 40:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    whole = fit(Net(), mixed, SkipOutliers(**SHORT), Save())
    assert whole.global_step == len(mixed) - 2
    resumed = fit(Net(), loader(mixed[41:], sized=False), SkipOutliers(**SHORT), Save(), ckpt_path=tmp_path / "at.ckpt")
    assert_same(everything(whole), everything(resumed))


def test_lasting_garbage_is_a_clean_stop() -> None:
    """Bug: garbage is dropped for ever, or learned as the new level before ``max_in_a_row`` is reached."""
    with pytest.raises(TrainingStopped, match="8 outliers in a row"):
        fit(
            Net(),
            HEALTHY_RUN[:40] + garbage(20),
            SkipOutliers(**SHORT, regime_after=4, max_in_a_row=8),
        )


def test_the_preset_is_a_callback_too() -> None:
    """Bug: a preset defined on the rule is missing on the callback, makes a rule, or ignores its arguments."""
    callback = SkipOutliers.olmo(name="mine")
    assert isinstance(callback, SkipOutliers)
    assert (callback.state_key, callback.robust) == ("mine", False)
