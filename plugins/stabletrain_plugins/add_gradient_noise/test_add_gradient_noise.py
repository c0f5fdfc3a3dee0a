import math
from typing import Any

import pytest
import torch
from fits import HEALTHY, NAN_LOSS, Net, assert_same, batches, everything, fit
from torch import Tensor

from stabletrain import AddGradientNoise, SkipNonFinite, UserError


def noise_of(plugin: AddGradientNoise, *names: str, shape: tuple[int, ...] = (1000,), **options: Any) -> list[Tensor]:
    grads = [torch.zeros(shape, **options) for _ in names]
    plugin.transform(names, grads, grads)
    return grads


def test_mean_and_deviation_follow_the_formula() -> None:
    """Bug: the variance is taken for the deviation, the decay counts from 1, or does not apply."""
    plugin = AddGradientNoise(std=0.5, decay=1.0)
    for t in range(4):
        found = noise_of(plugin, "w", shape=(100_000,))[0]
        assert found.mean().item() == pytest.approx(0.0, abs=0.01)
        assert found.std().item() == pytest.approx(0.5 / math.sqrt(1 + t), rel=0.01)
        plugin.commit(True)


def test_noise_is_independent_between_steps_parameters_and_seeds() -> None:
    """Bug: generators with neighbouring seeds begin alike, or each step has the noise of the last one."""
    found = []
    for seed in (0, 1):
        plugin = AddGradientNoise(std=1.0, decay=0.0, seed=seed)
        for _ in range(3):
            found += noise_of(plugin, "a", "b", shape=(20_000,))
            plugin.commit(True)
    correlation = torch.corrcoef(torch.stack(found))
    assert (correlation - torch.eye(len(found))).abs().max() < 0.04


def test_it_does_not_depend_on_the_other_parameters() -> None:
    """Bug: in a step in which another parameter has no gradient, or another order, the noise is another one."""
    plugin = AddGradientNoise()
    first, second = noise_of(plugin, "a", "b")
    assert torch.equal(noise_of(plugin, "b")[0], second)
    assert torch.equal(noise_of(plugin, "b", "a")[1], first)


def test_the_runs_generators_are_not_used() -> None:
    """Bug: with the plugin, dropout and the order of the data are others."""
    before = torch.get_rng_state()
    noise_of(AddGradientNoise(), "w")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_every_dtype(dtype: torch.dtype) -> None:
    """Bug: a complex or low-precision gradient raises an error, or gets no noise."""
    found = noise_of(AddGradientNoise(), "w", dtype=dtype)[0]
    assert found.dtype == dtype
    assert found.abs().double().mean() == pytest.approx(0.08, abs=0.02)


def test_an_element_of_a_sparse_gradient_gets_noise_once() -> None:
    """Bug: each entry of one element gets noise, which then has twice the variance."""
    gradient = torch.sparse_coo_tensor([[1, 1, 3]], torch.zeros(3, 1), (4, 1), check_invariants=True)
    AddGradientNoise().transform(["w"], [gradient], [gradient])
    dense = gradient.to_dense().flatten()
    assert gradient.is_coalesced() or gradient._nnz() == 2
    assert (dense != 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(3))
def test_a_non_finite_element_stays_alone(bad: float, position: int) -> None:
    """Bug: a NaN becomes a number, or spreads to other elements."""
    gradient = torch.zeros(3)
    gradient[position] = bad
    AddGradientNoise().transform(["w"], [gradient], [gradient])
    assert torch.isfinite(gradient).tolist() == [at != position for at in range(3)]


def test_a_dropped_step_leaves_the_noise_of_the_others() -> None:
    """Bug: a dropped step takes noise, so that all later steps differ from a run that never saw the batch."""
    items = batches(*[HEALTHY] * 3, NAN_LOSS, *[HEALTHY] * 3)
    with_bad = fit(Net(), items, AddGradientNoise(), SkipNonFinite())
    without = fit(Net(), [*items[:3], *items[4:]], AddGradientNoise(), SkipNonFinite())
    assert_same(everything(with_bad), everything(without))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": -0.1}, "std must be"),
        ({"std": "a"}, "std must be"),
        ({"decay": math.nan}, "decay must"),
        ({"decay": None}, "decay must"),
        ({"seed": "a"}, "seed must"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Bug: NaN as a deviation makes every gradient NaN."""
    with pytest.raises(UserError, match=message):
        AddGradientNoise(**arguments)
