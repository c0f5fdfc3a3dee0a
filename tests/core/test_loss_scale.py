"""Whether a non-finite gradient is put down to the loss scale or to the batch."""

import math
import random

import pytest

from stabletrain.core.loss_scale import ScaleHistory
from stabletrain.core.outcome import Outcome
from stabletrain.core.state import from_plain, to_plain


def step(scale: float, norm: float = 1.0, loss: float = 2.0, overflow: bool = False) -> Outcome:
    return Outcome(0, loss, norm, norm, norm, overflow=overflow, loss_scale=scale)


def after(*steps: Outcome) -> ScaleHistory:
    history = ScaleHistory()
    for each in steps:
        history = history.add(each)
    return history


WELL_AT_1024 = [step(1024.0)] * 10


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0**-20])
def test_a_scale_of_one_and_below_is_never_the_cause(scale: float) -> None:
    """Bug: the scale is lowered until gradients vanish, for batches that are NaN at any scale."""
    assert ScaleHistory().blames_batch(scale)
    assert not ScaleHistory().blames_batch(1.0000001)


@pytest.mark.parametrize(("count", "scale", "blamed"), [(10, 128.0, True), (9, 128.0, False), (10, 129.0, False)])
def test_it_needs_ten_steps_at_eight_times_the_scale(count: int, scale: float, blamed: bool) -> None:
    """Bugs: one lucky step at a large scale makes all later overflows the batch's fault; an edge off by one."""
    assert after(*[step(1024.0)] * count, step(scale)).blames_batch(scale) is blamed


def test_steps_at_any_larger_scale_count() -> None:
    """Bug: with a NaN in every fifth batch no scale has ten steps, so the scale falls to 1 and gradients underflow."""
    history = after(*[step(4096.0)] * 4, *[step(2048.0)] * 4, *[step(1024.0)] * 4, step(128.0))
    assert history.blames_batch(128.0)
    assert not after(*[step(4096.0)] * 4, *[step(2048.0)] * 4, *[step(1024.0)] * 4, step(256.0)).blames_batch(256.0)


@pytest.mark.parametrize(
    "bad", [step(128.0, math.inf, overflow=True), step(128.0, math.nan), step(128.0, math.inf)], ids=str
)
def test_two_in_a_row_are_an_overflow(bad: Outcome) -> None:
    """Bug: gradients that have grown for good are dropped one after the other, and the scale stays."""
    history = after(*WELL_AT_1024, step(128.0))
    assert history.blames_batch(128.0)
    assert not history.add(bad).blames_batch(128.0)
    assert not history.add(bad).blames_batch(64.0), "nothing has gone well at the new scale yet"
    assert history.add(bad).add(step(64.0)).blames_batch(64.0)


@pytest.mark.parametrize(("norm", "blamed"), [(0.5, True), (4.0, True), (4.01, False), (100.0, False)])
def test_grown_gradients_are_no_bad_batches(norm: float, blamed: bool) -> None:
    """Bug: gradients that are larger for good overflow now and then, and each time the step is dropped at one scale."""
    assert after(*WELL_AT_1024, step(128.0, norm)).blames_batch(128.0) is blamed


def test_a_zero_gradient_says_nothing() -> None:
    """Bug: steps without a gradient prove that a scale is not too large."""
    history = after(*WELL_AT_1024, step(128.0, 2.0))
    assert history.add(step(128.0, 0.0)) == history
    assert after(*[step(1024.0, 0.0)] * 10, step(128.0)).scales == (128.0,)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_nonfinite_loss_changes_nothing(loss: float) -> None:
    """Bug: a batch whose loss is NaN counts for or against the scale."""
    history = after(*WELL_AT_1024, step(128.0))
    for norm in (1.0, math.nan, math.inf):
        assert history.add(step(128.0, norm, loss)) == history


def test_the_state_is_bounded_and_can_be_saved() -> None:
    """Bugs: a table that grows with every scale; the ten highest forgotten after smaller ones."""
    draw = random.Random(0)
    scales = [2.0 ** draw.uniform(-140, 120) for _ in range(3000)]
    history = after(*map(step, scales))
    assert history.scales == history.norms == tuple(sorted(scales, reverse=True)[:10])
    assert from_plain(ScaleHistory, to_plain(history)) == history
