"""The rules at their edges; what they find in whole synthetic runs is in tests/benchmarks/test_findings.py."""

from dataclasses import replace

import numpy as np
import pytest

from stabletrain.tracking.findings import OUTCOMES, RULES, findings, outcome, sentence
from stabletrain.tracking.series import Layer, Rollback, Series


def run(steps: int = 1000, seed: int = 0, **changes: object) -> Series:
    """A healthy run with a learning rate that decays."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)
    made = Series(
        step=t,
        loss=1.5 + 2.5 * np.exp(-t / (steps / 6)) + rng.normal(0, 0.05, steps),
        grad_norm=np.exp(rng.normal(-0.5, 0.3, steps)),
        clipped=np.zeros(steps),
        skipped=np.zeros(steps),
        overflow=np.zeros(steps),
        without_loss=np.zeros(steps),
        lr=5e-3 * (1.02 - t / steps),
    )
    return replace(made, **changes)


def names(series: Series) -> list[str]:
    return [each.name for each in findings(series)]


def with_loss(series: Series, at: object, value: object) -> Series:
    loss = series.loss.copy()
    loss[at] = value
    return replace(series, loss=loss)


def marked(steps: int, at: object) -> np.ndarray:
    result = np.zeros(steps)
    result[at] = 1.0
    return result


def test_a_healthy_run_has_no_findings() -> None:
    assert names(run()) == []
    assert outcome(run(), "finished") == "healthy"
    assert sentence(run()) is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_losses_at_every_position(value: float) -> None:
    """Bugs: one NaN makes a statistic NaN, or is an alarm; the last one, after which nothing comes, is overlooked; a
    warning of numpy's."""
    healthy = run(130)
    for position in range(130):
        found = names(with_loss(healthy, position, value))
        assert found == (["diverged"] if position == 129 else []), position
    for count in range(1, 131):
        assert "diverged" in names(with_loss(healthy, slice(130 - count, None), value)), count
    assert names(with_loss(healthy, slice(0, 60), value))[:1] == ["non-finite often"]


def test_numbers_of_any_size() -> None:
    """Bug: a loss or norm near the largest float ends in a warning of numpy's, or in infinity."""
    for value in (1e308, -1e308, 1.7e308, 5e-324):
        loss = np.where(np.arange(300) % 2, value, 1.0)
        findings(run(300, loss=loss, grad_norm=np.abs(loss)))
        assert outcome(run(300, loss=loss), "finished") in {word for word, _ in OUTCOMES}


def test_steps_that_are_meant_to_have_no_loss() -> None:
    """Bugs: steps without a loss by design, or overflows, count as non-finite; a NaN that was dropped at the end is
    taken for NaN weights."""
    for field in ("without_loss", "overflow"):
        gone = marked(1000, slice(0, None, 25))
        assert names(replace(with_loss(run(), gone > 0, np.nan), **{field: gone})) == [], field
    dropped = with_loss(run(), slice(-1, None), np.nan)
    assert names(replace(dropped, skipped=marked(1000, -1))) == []
    assert names(dropped) == ["diverged"]


def test_short_runs_say_nothing() -> None:
    """Bugs: something is concluded from a few steps; a short run that ends in NaN, or far above its start, is
    healthy."""
    for steps in (0, 1, 5, 99):
        short = run(steps)
        assert names(short) == []
        assert outcome(short, "finished") == "healthy"
    assert names(run(100)) == []
    assert outcome(with_loss(run(60), slice(50, None), np.nan), "finished") == "diverged"
    assert outcome(with_loss(run(60), slice(40, None), 9.0), "finished") == "diverged"


@pytest.mark.parametrize("shift", [-50.0, -4.0, -1.5, 0.0, 50.0])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_unit_of_the_loss_does_not_matter(shift: float, scale: float) -> None:
    """Bug: a threshold relative to the loss, which is wrong for one that is negative, zero, tiny or large."""
    healthy = run(600)
    moved = replace(healthy, loss=(healthy.loss + shift) * scale)
    assert names(moved) == []
    assert names(with_loss(moved, slice(300, None), moved.loss[:300][::-1] + 0.1 * scale))[:1] == ["diverged"]


def test_a_change_by_design_is_no_divergence() -> None:
    """Bugs: a level that the user has announced counts as divergence, as spikes, or as overfitting."""
    loss = run().loss
    loss[600:] += 5.0
    validation = (np.arange(99, 1000, 100), np.where(np.arange(99, 1000, 100) > 600, 7.0, 2.0))
    meant = run(loss=loss, changes=[600], validation=validation)
    assert names(meant) == []
    assert "diverged" in names(replace(meant, changes=()))
    assert outcome(meant, "finished") == "healthy"


def test_a_fine_tuning_that_gains_nothing_has_not_diverged() -> None:
    """Bug: half of no gain is nothing, so that a rise by a thousandth is a divergence."""
    rng = np.random.default_rng(0)
    loss = 1.0 + np.linspace(0, 0.01, 1000) + rng.normal(0, 1e-4, 1000)
    assert names(run(loss=loss)) == ["did not learn"]


def test_a_run_of_which_the_beginning_is_missing() -> None:
    """Bug: the first loss that is known, of a resumed run, is taken for the first one: it has not learned."""
    late = run(loss=1.5 + np.random.default_rng(0).normal(0, 0.05, 1000), step=np.arange(5000, 6000))
    assert names(late) == []
    assert names(replace(late, step=np.arange(1000))) == ["did not learn"]


def test_several_optimizers_have_no_curve() -> None:
    """Bug: the losses of generator and discriminator, one after the other, are spikes."""
    mixed = run(loss=np.where(np.arange(1000) % 2, 5.0, 0.5), mixed=True, skipped=marked(1000, slice(400, 410)))
    assert names(mixed) == ["skips in one place"]
    assert outcome(mixed, "finished") == "healthy"


def test_clipping() -> None:
    """Bugs: plugins that clip tensors, which they do at every step by design, are an alarm; the warm-up counts; the
    advice has no number."""
    lr = np.minimum(np.arange(1000) / 500, 1.0)
    half = run(clipped=marked(1000, slice(0, 600)), lr=lr)
    assert names(half) == []
    most = run(clipped=marked(1000, slice(400, 900)), lr=lr)
    (found,) = findings(most)
    assert found.name == "clipped always"
    assert "90th percentile" in found.advice
    assert names(replace(most, clips_tensors=True)) == []
    assert names(run(bound=100.0)) == ["clipped never"]
    assert names(run(bound=100.0, steps=999)) == []
    assert names(run(bound=100.0, grad_norm=None)) == []


def test_rates() -> None:
    """Bugs: a step schedule, whose last stage is long by design, or a constant rate ends early; NaN among the rates."""
    t = np.arange(1000)
    decay = 5e-3 * np.maximum(1 - t / 700, 0.01)
    assert names(run(lr=decay)) == ["rate at its end early"]
    assert names(run(lr=decay[::10], **{f: getattr(run(100), f) for f in ("step", "loss", "grad_norm", "clipped",
                     "skipped", "overflow", "without_loss")}, every=10)) == ["rate at its end early"]  # fmt: skip
    assert names(run(lr=5e-3 * 0.1 ** np.searchsorted([500, 750], t, side="right"))) == []
    assert names(run(lr=np.full(1000, np.nan))) == []
    for every in (10, 50):  # recorded at some steps only, and interpolated
        for lr, found in (
            (5e-3 * 0.1 ** np.searchsorted([500, 750], t, side="right"), []),
            (decay, ["rate at its end early"]),
        ):
            rates = t[::every], lr[::every]
            assert names(run(lr=np.interp(t, *rates), rates=rates)) == found


def test_spikes_that_were_undone_or_dropped_are_no_finding() -> None:
    """Bugs: a divergence that a rollback has undone is reported as spikes, too; so is a batch that was skipped."""
    spiked = with_loss(run(), slice(500, 520), 8.0)
    assert names(spiked) == ["spiky"]
    assert outcome(spiked, "finished") == "spiked"
    undone = replace(spiked, rollbacks=[Rollback(step=520, to=480)])
    assert names(undone) == []
    assert outcome(undone, "finished") == "rolled_back"
    assert names(replace(spiked, skipped=marked(1000, slice(500, 520)))) == ["skips in one place", "skips many"]


def test_the_spike_of_a_long_run() -> None:
    """Bug: in 20,000 steps a spike of ten is no share, and the run is called healthy; one outlier is a spike."""
    assert outcome(with_loss(run(20_000), slice(15_000, 15_010), 8.0), "finished") == "spiked"
    assert outcome(with_loss(run(20_000), 15_000, 8.0), "finished") == "healthy"
    assert outcome(run(spikes=[400]), "finished") == "spiked"


def test_layers_and_scales() -> None:
    """Bug: a NaN of a layer, or a run without a loss scaler, is a finding."""
    layers = [Layer("net.0", 1e-6), Layer("net.1", 1.0)]
    assert names(run(layers=layers)) == ["vanishing"]
    assert names(run(layers=layers[::-1])) == []
    assert names(run(layers=[Layer("net.0", np.nan), *layers])) == []
    assert names(run(loss_scale=0.5)) == ["scale collapsed"]
    assert names(run(loss_scale=1.0)) == names(run(loss_scale=np.nan)) == []


def test_rollbacks_in_one_place() -> None:
    one, two = Rollback(300, 280, frozenset("ab")), Rollback(700, 680, frozenset("bc"))
    assert names(run(rollbacks=[one, two])) == ["rollbacks in one place"]
    assert names(run(rollbacks=[one, two._replace(excluded=frozenset("cd"))])) == []


def test_the_outcome_follows_the_end_first() -> None:
    """Bugs: a run that was killed after it had diverged is called diverged; the words of MLflow are not understood."""
    diverged = with_loss(run(), slice(800, None), np.nan)
    ends = {"failed": "failed", "refused": "failed", "stopped": "stopped", "terminated": "killed", "KILLED": "killed"}
    assert {end: outcome(diverged, end) for end in ends} == ends
    assert outcome(diverged, "FINISHED") == outcome(diverged, "RUNNING") == "diverged"
    assert {word for word, _ in OUTCOMES} == {*ends.values(), "diverged", "rolled_back", "spiked", "healthy"}


def test_the_sentence_is_one_line() -> None:
    """Bugs: the end of a run names a finding that is none; a rollback that helped is not told."""
    text = sentence(with_loss(run(), slice(800, None), 4.5))
    assert text is not None
    assert text.startswith("diverged: the loss ends at 4.5")
    assert "try: a third of the learning rate" in text
    assert "\n" not in text
    assert sentence(run(rollbacks=[Rollback(300, 280)], skipped=marked(1000, 4))) == (
        "1 rollback, at step 300; 1 step skipped"
    )
    assert sentence(run(bound=100.0)) is None


def test_the_rules_are_pure() -> None:
    """Bug: a rule changes the arrays that it is given, so that the next one finds something else."""
    series = with_loss(run(), slice(500, 520), 8.0)
    before = {name: value.copy() for name, value in vars(series).items() if isinstance(value, np.ndarray)}
    assert findings(series) == findings(series)
    assert all(np.array_equal(value, getattr(series, name)) for name, value in before.items())
    assert len({rule.name for rule in RULES}) == len(RULES)
