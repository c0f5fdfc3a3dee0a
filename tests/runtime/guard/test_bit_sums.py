"""The number of a tensor's bits changes with every flipped bit, and with nothing else."""

import math

import pytest
import torch

from stabletrain.runtime.guard.bit_sums import bit_sums

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64]
WHOLE = [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool]


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE])
def test_every_flipped_bit_changes_the_number(dtype: torch.dtype) -> None:
    """Bugs: a type whose bits are not all read; elements that do not fill a word of 64 bits left out; a view whose
    memory begins within such a word, or whose elements are not in order, read as others."""
    whole = torch.tensor([[1.5, -2.25, 0.0, 3.0, 1.0], [0.5, 1.0, -1.0, 2.0, 0.0], [1.0, 7.0, 5.5, -3.0, 1.0]])
    whole = whole.abs().to(dtype) if dtype in WHOLE else whole.to(dtype)
    for tensor in (whole, whole.T, whole[1:, 1:], whole[0, 1:4], whole[0, 0]):
        (before,) = bit_sums([tensor])
        assert bit_sums([tensor.clone(), whole]) == [before, *bit_sums([whole])]
        assert bit_sums([tensor.contiguous()]) == [before]
        raw = tensor.clone().contiguous().view(-1).view(torch.uint8)
        flips = raw.repeat(8 * len(raw), 1)
        for i in range(len(flips)):
            flips[i, i // 8] ^= 1 << (i % 8)
        assert before not in bit_sums([each.view(dtype) for each in flips])
    assert bit_sums([whole[:0]]) == [0]


def test_numbers_that_compare_otherwise_than_their_bits() -> None:
    """Bugs: a NaN, which equals nothing, taken for a difference; -0.0 for 0.0; a conjugated view read as it lies."""
    poisoned = torch.full((3,), math.nan)
    assert bit_sums([poisoned]) == bit_sums([poisoned.clone()])
    assert bit_sums([torch.zeros(3)]) != bit_sums([-torch.zeros(3)])
    turned = torch.tensor([1 + 2j])
    assert bit_sums([turned.conj()]) == bit_sums([turned.conj().resolve_conj()]) != bit_sums([turned])
    assert bit_sums([]) == []
