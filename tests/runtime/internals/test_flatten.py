"""Several tensors as one vector, by a private function of torch."""

import torch

from stabletrain.runtime.internals.flatten import flatten


def test_all_elements_in_the_order_of_the_tensors() -> None:
    """Bugs: another order of elements or tensors, so that a norm has other bits than before; an error for a tensor
    without elements or dimensions."""
    tensors = [torch.randn(4, 3).t(), torch.randn(()), torch.empty(0, 2), torch.randn(6)[::2]]
    tensors.append(torch.randn(1, 2, 3, 3).to(memory_format=torch.channels_last))
    assert torch.equal(flatten(tensors), torch.cat([t.reshape(-1) for t in tensors]))
    assert torch.equal(flatten(tensors[:1]), tensors[0].reshape(-1))
