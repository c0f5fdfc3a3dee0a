"""The device's evaluation of limits decides as the host's does, to the last bit."""

import math

import numpy as np
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from stabletrain.core.limits import Bound, Limits, SkipAbove, SkipBelow, SkipNonFinite
from stabletrain.runtime.guard.device_limits import decide

LEVELS = [0.0, 1.0, 2.5, 0.1, 1e-3, 1e-30, 1e30, math.e]
singles = st.one_of(
    st.floats(0, 2.0**100, width=32), st.sampled_from([float(np.float32(x)) for x in LEVELS]), st.sampled_from(LEVELS)
)
awkward = st.one_of(singles, st.sampled_from([math.nan, math.inf, -math.inf, -1.0]))


@st.composite
def bounds(draw: st.DrawFn) -> Bound:
    if draw(st.booleans()):
        above = draw(st.floats(-20, 20))
        return Bound(above, draw(st.floats(-20, 20)), draw(st.floats(0, 9)), above - draw(st.floats(0, 5)), log=True)
    above = draw(singles)
    return Bound(above, draw(singles), draw(st.floats(0, 9)), above - draw(st.floats(0, 5)))


skips = st.one_of(
    st.just(SkipNonFinite()),
    st.builds(SkipAbove, st.sampled_from(["loss", "grad_norm"]), awkward),
    st.builds(SkipBelow, st.one_of(awkward, st.floats(-(2.0**100), 0))),
)
limits = st.builds(
    lambda parts, fallback: Limits.of(*parts)._replace(fallback=frozenset(fallback)),
    st.lists(st.one_of(bounds(), skips), max_size=4),
    st.lists(bounds(), max_size=2),
)


def single(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


@given(limits, awkward, awkward)
@example(Limits.of(SkipBelow(math.nan), SkipBelow(1e-3)), 0.0, 0.0)
def test_host_and_device_drop_the_same_steps(some: Limits, loss: float, norm: float) -> None:
    """Bug: a threshold rounded to float32 on one side only: ranks, replays or modes that decide apart."""
    on_device = decide(some, single(loss), single(norm), single(norm))
    on_host = some.skips_step(single(loss).item(), single(norm).item())
    assert on_device.dropped.item() == float(on_host)
    assert on_device.dropped.dtype == on_device.grad_scale.dtype == torch.float32


@given(singles, st.sampled_from(["loss", "grad_norm"]))
def test_a_value_at_its_threshold_is_not_above_it(value: float, signal: str) -> None:
    """Bug: 0.1 in float64 against 0.1 in float32."""
    stored = single(value)
    low = Limits.of(SkipBelow(stored.item()))
    assert decide(low, stored, stored, stored).dropped.item() == 0.0
    assert decide(low, single(math.nextafter(stored.item(), -math.inf)), stored, stored).dropped.item() == 0.0
    high = Limits.of(SkipBelow(math.nextafter(stored.item(), math.inf)), SkipBelow(-1e30))
    assert decide(high, stored, stored, stored).dropped.item() == 1.0
    some = Limits.of(SkipAbove(signal, stored.item()))  # type: ignore[arg-type]
    assert decide(some, stored, stored, stored).dropped.item() == 0.0
    below = Limits.of(SkipAbove(signal, math.nextafter(stored.item(), -math.inf)))  # type: ignore[arg-type]
    assert decide(below, stored, stored, stored).dropped.item() == float(math.isfinite(stored.item()))


@given(limits, singles)
@example(Limits.of(Bound(1.0, 1.0)), 1.0)
@example(Limits.of(Bound(0.0, 0.0, log=True)), 1.0)
@example(Limits.of(Bound(0.3, 0.3, pull=1e-40, centre=0.3, log=True)), float(np.float32(math.exp(0.3))))
def test_host_and_device_hold_to_the_same_norm(some: Limits, value: float) -> None:
    """Bugs: another formula on the device; a scale that is not exactly 1 where nothing is clipped."""
    norm = single(value)
    held = some.clip(norm.item())
    scale = decide(some, single(1.0), norm, norm).grad_scale
    assert scale.item() >= 1.0
    if held == norm.item():
        assert scale.item() == 1.0
        return
    assume(held > 1e-30 and norm.item() / held < 1e30)
    expected = np.float32(held)
    on_device = np.float32(norm.item() / scale.double().item())
    assert abs(float(on_device) - float(expected)) <= 1.01 * float(np.spacing(expected))


@given(limits, st.sampled_from([math.nan, math.inf]))
def test_a_non_finite_norm_is_not_scaled(some: Limits, bad: float) -> None:
    """Bug: infinity divided by infinity."""
    assert decide(some, single(1.0), single(bad), single(bad)).grad_scale.item() == 1.0


def test_a_transform_separates_the_two_norms() -> None:
    """Bug: conditions that see the transformed norm, or bounds that see the raw one."""
    some = Limits.of(SkipAbove("grad_norm", 5.0), Bound(1.0, 1.0))
    decision = decide(some, single(1.0), single(6.0), single(2.0))
    assert (decision.dropped.item(), decision.grad_scale.item()) == (1.0, 2.0)
    decision = decide(some, single(1.0), single(2.0), single(6.0))
    assert (decision.dropped.item(), decision.grad_scale.item()) == (0.0, 6.0)


def test_a_target_of_zero_clips_to_zero() -> None:
    """Bug: 0 / 0 instead of a gradient of zero."""
    assert decide(Limits.of(Bound(1.0, 0.0)), single(1.0), single(2.0), single(2.0)).grad_scale.item() == math.inf
