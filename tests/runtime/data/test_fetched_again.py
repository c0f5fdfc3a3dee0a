"""What a batch is recognized by when it is fetched again."""

import pytest
import torch

from stabletrain.runtime.data.fetched_again import outline


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, dtype=torch.complex64).conj(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.tensor([True, False]),
        lambda: torch.zeros(0, 3),
        lambda: torch.ones(1).expand(1000),
        lambda: torch.randn(100, 100, requires_grad=True).t(),
    ],
    ids=["conjugate", "nested", "bool", "empty", "expanded", "transposed"],
)
def test_batches_of_all_kinds_have_an_outline(make):
    """Bug: a batch that is merely stored ends the run, because its memory cannot be read as it is."""
    tensor = make()
    assert outline([tensor]) == outline([tensor.clone()])
