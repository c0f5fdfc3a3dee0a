import math

import pytest
import torch
from torch import Tensor, nn

from stabletrain import ClipValue, UserError


def transformed(gradient: Tensor, max_value: float = 1.0) -> Tensor:
    ClipValue(max_value).transform(["w"], [gradient], [gradient])
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_same_bits_as_torch(dtype: torch.dtype) -> None:
    """Bug: another result than torch's, in some dtype."""
    parameter = nn.Parameter(torch.zeros(50, dtype=dtype))
    parameter.grad = torch.randn(50, generator=torch.Generator().manual_seed(0)).to(dtype)
    mine = transformed(parameter.grad.clone(), 0.7)
    torch.nn.utils.clip_grad_value_([parameter], 0.7)
    assert torch.equal(mine, parameter.grad)
    assert mine.abs().max() == torch.tensor(0.7, dtype=dtype)


@pytest.mark.parametrize("position", range(4))
def test_nan_stays_nan_and_touches_no_other_element(position: int) -> None:
    """Bug: a NaN becomes the limit, which hides it from skip rules, or spreads to other elements."""
    gradient = torch.tensor([0.5, -0.5, 3.0, -3.0])
    gradient[position] = math.nan
    expected = torch.tensor([0.5, -0.5, 1.0, -1.0])
    expected[position] = math.nan
    assert torch.equal(transformed(gradient).nan_to_num(9.0), expected.nan_to_num(9.0))


def test_gradients_within_the_limit_keep_their_bits() -> None:
    """Bug: -0.0 becomes 0.0, or a tiny element 0."""
    gradient = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-30])
    before = gradient.clone()
    assert torch.equal(transformed(gradient).view(torch.int32), before.view(torch.int32))


def test_an_element_of_a_sparse_gradient_is_the_sum_of_its_entries() -> None:
    """Bug: entries of one element are clipped before they are added."""
    gradient = torch.sparse_coo_tensor([[1, 1, 2]], [[0.8], [0.8], [0.5]], (4, 1), check_invariants=True)
    assert transformed(gradient).to_dense().flatten().tolist() == [0.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan])
def test_a_limit_that_is_no_limit_is_refused(wrong: float) -> None:
    """Bug: a limit of 0 or below, which stops or reverses training, or NaN, is accepted."""
    with pytest.raises(UserError, match=r"clip_value: max_value must be > 0, got .*ClipValue\(max_value=...\)"):
        ClipValue(wrong)
