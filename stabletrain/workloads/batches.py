"""Map-style datasets that gather a whole batch with one indexing operation, and the collate that lets it through."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = TypeVar("Batch")


class Windows(Dataset[Tensor]):
    """Windows of one text, each a fixed function of (seed, index).

    The text is cut into stretches of `length - 1` tokens; window i starts at a seeded random place in one of them, and
    a seeded permutation puts the stretches in no order of the text. So an unshuffled loader already gives batches that
    depend on nothing but (seed, step), and one pass sees nearly every token once.

    Args:
        tokens: 1-D tensor, at least `2 * length` long.
        length: tokens per window.
        seed: any integer of 64 bits.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        stride = length - 1
        count = (len(tokens) - stride) // stride
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(stride, (count,), generator=generator)
        self.starts = torch.randperm(count, generator=generator) * stride + places
        # a view: position i of it is the window that starts at token i
        self._windows = tokens.unfold(0, length, 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[self.starts[index]].long()

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """All windows of a batch at once, (batch, length), int64."""
        return self._windows[self.starts[torch.as_tensor(indices)]].long()


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Pairs (input, label) held in two tensors.

    Args:
        inputs: first dimension counts the examples.
        labels: the same length.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All examples of a batch at once."""
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.labels[chosen]


def as_gathered(batch: Batch) -> Batch:
    """Collate of a dataset whose `__getitems__` already returns the batch."""
    return batch
