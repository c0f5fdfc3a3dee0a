import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stabletrain import ClipUnitwise, UserError
from stabletrain.testing.toy import ToyModule
from stabletrain.testing.trainer import quiet_trainer

VECTORS = json.loads((Path(__file__).parents[3] / "tests" / "vectors" / "agc.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["case"]: case for case in VECTORS["cases"]}
NON_FINITE = ("one_nan_row", "one_inf_row")
ZERO_WEIGHT = ("zero_init_bias_1d", "zero_init_linear", "row_one_dead_weight")


def numbers(values: Any) -> Any:
    return [numbers(v) for v in values] if isinstance(values, list) else float(values)


def tensor(values: Any) -> Tensor:
    return torch.tensor(numbers(values), dtype=torch.float64)


def clipped(case: dict[str, Any]) -> Tensor:
    clip = ClipUnitwise(case["params"]["clip_factor"], case["params"]["eps"])
    gradient = tensor(case["grad"])
    clip.transform(["w"], [tensor(case["weight"])], [gradient])
    return gradient


@pytest.mark.parametrize("name", [name for name in CASES if name not in NON_FINITE])
def test_matches_timm(name: str) -> None:
    """Bug: another unit, epsilon or scale than in timm's AGC."""
    expected = tensor(CASES[name]["output"]["timm"])
    torch.testing.assert_close(clipped(CASES[name]), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", ZERO_WEIGHT)
def test_a_parameter_that_began_at_zero_is_not_frozen_as_in_composer(name: str) -> None:
    """Bug: a weight of norm 0 limits its gradient to 0, so that it never changes."""
    case = CASES[name]
    dead = (tensor(case["output"]["composer"]) == 0) & (tensor(case["grad"]) != 0)
    assert dead.any()
    assert (clipped(case)[dead] != 0).all()


@pytest.mark.parametrize("name", NON_FINITE)
def test_a_nonfinite_unit_is_unchanged_and_the_others_are_clipped(name: str) -> None:
    """Bug: a non-finite unit is scaled to 0 or NaN, or stops the clipping of the others."""
    case = CASES[name]
    result, given = clipped(case), tensor(case["grad"])
    assert torch.equal(result[0].nan_to_num(9.0), given[0].nan_to_num(9.0))
    torch.testing.assert_close(result[1], tensor(case["output"]["timm"])[1], rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(6))
def test_a_nonfinite_element_changes_no_other_unit(position: int, bad: float) -> None:
    """Bug: one non-finite element changes the gradients of other units."""
    weight, gradient = torch.ones(3, 2), torch.ones(3, 2)
    gradient.view(-1)[position] = bad
    ClipUnitwise().transform(["w"], [weight], [gradient])
    rest = torch.arange(3) != position // 2
    assert torch.allclose(gradient[rest], torch.full((2, 2), 0.01))
    assert gradient[~rest].flatten()[1 - position % 2] == 1.0


def test_a_gradient_that_needs_no_clipping_keeps_its_bits() -> None:
    """Bug: a unit within its limit is multiplied by 1 - epsilon, or a zero gradient by 0 / 0."""
    weight, gradient = torch.ones(3, 4), torch.full((3, 4), 1e-3)
    gradient[1] = 0.0
    before = gradient.clone()
    ClipUnitwise().transform(["w"], [weight], [gradient])
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("shape", [(), (5,), (3, 2), (3, 2, 2, 2), (0, 4), (4, 0)])
def test_every_unit_of_every_shape_lands_on_its_limit(shape: tuple[int, ...]) -> None:
    """Bug: norms over the wrong dimensions for scalars, vectors, kernels or empty tensors."""
    generator = torch.Generator().manual_seed(1)
    weight, gradient = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    ClipUnitwise(0.02).transform(["w"], [weight], [gradient])
    rows = (weight, gradient) if weight.ndim > 1 else (weight.view(1, -1), gradient.view(1, -1))
    limits, norms = (t.flatten(1).norm(dim=1) for t in rows)
    torch.testing.assert_close(norms, 0.02 * limits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_half_precision_are_taken_in_float32(dtype: torch.dtype) -> None:
    """Bug: the sum of squares overflows in half precision, and the unit is scaled to 0."""
    weight, gradient = torch.full((1, 4096), 2.0), torch.full((1, 4096), 8.0, dtype=dtype)
    ClipUnitwise(0.25).transform(["w"], [weight], [gradient])
    assert torch.equal(gradient, torch.full((1, 4096), 0.5, dtype=dtype))  # its squares sum to more than fp16 holds


def test_excluded_parameters_are_unchanged() -> None:
    """Bug: exclude matches no parameter, or all; or fails where it excludes every parameter."""
    parameters, grads = [torch.ones(2, 2)] * 3, [torch.ones(2, 2) for _ in range(3)]
    names = ["body.weight", "head.weight", "head.scale"]
    ClipUnitwise(exclude=["head.*"]).transform(names, parameters, grads)
    assert [g[0, 0].item() == 1.0 for g in grads] == [False, True, True]
    ClipUnitwise(exclude=["*"]).transform(names, parameters, grads)


def test_a_sparse_gradient_is_refused_by_name() -> None:
    """Bug: an error from within torch that names neither the parameter nor what to do."""
    sparse = torch.sparse_coo_tensor([[1]], [[0.8]], (4, 1), check_invariants=True)
    with pytest.raises(UserError, match=r"the gradient of tokens.weight is sparse, .*plugins\.clip\.exclude"):
        ClipUnitwise().transform(["tokens.weight"], [torch.ones(4, 1)], [sparse])
    ClipUnitwise(exclude=["tokens.*"]).transform(["tokens.weight"], [torch.ones(4, 1)], [sparse])


def test_a_misspelt_pattern_is_refused_before_the_first_step() -> None:
    """Bug: a misspelt pattern matches no parameter, and the head is clipped without a message."""
    with pytest.raises(UserError, match=r"pattern 'nett\.\*', which matches none of the module's 6 parameters"):
        ClipUnitwise(exclude=["nett.*"]).on_fit_start(quiet_trainer(), ToyModule())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_ratio": 0.0}, r"max_ratio must be > 0, got 0.0 \(ClipUnitwise\(max_ratio=...\)\)"),
        ({"eps": -1.0}, r"eps must be > 0"),
        ({"exclude": "head.*"}, r"exclude must be a list of patterns"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Bug: a ratio or epsilon of 0 is accepted; one pattern as a text is taken for a list of characters."""
    with pytest.raises(UserError, match=message):
        ClipUnitwise(**arguments)
