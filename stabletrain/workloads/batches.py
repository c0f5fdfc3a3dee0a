"""Map-style datasets that gather a whole batch with one indexing operation, and their collate function."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = TypeVar("Batch")


class Windows(Dataset[Tensor]):
    """Windows of one text, each a fixed function of (seed, index).

    The text is divided into segments of `length - 1` tokens. Window i starts at a seeded random position in one of
    them, and a seeded permutation gives the order of the segments. So the batches of an unshuffled loader depend on
    (seed, step) only, and one pass contains nearly every token once.

    Args:
        tokens: 1-D tensor of at least `2 * length` tokens.
        length: tokens per window.
        seed: any integer of 64 bits.
    """

    def __init__(self, tokens: Tensor, length: int, seed: int) -> None:
        stride = length - 1
        count = (len(tokens) - stride) // stride
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.randint(stride, (count,), generator=generator)
        self.starts = torch.randperm(count, generator=generator) * stride + offsets
        # a view: row i is the window that starts at token i
        self._windows = tokens.unfold(0, length, 1)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self._windows[self.starts[index]].long()

    def __getitems__(self, indices: Sequence[int]) -> Tensor:
        """Return all windows of a batch, (batch, length), int64."""
        return self._windows[self.starts[torch.as_tensor(indices)]].long()


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Pairs (input, label) from two tensors.

    Args:
        inputs: the first dimension is the example.
        labels: of the same length.
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return all examples of a batch."""
        chosen = torch.as_tensor(indices)
        return self.inputs[chosen], self.labels[chosen]


def as_gathered(batch: Batch) -> Batch:
    """Return the batch: collate function for datasets whose `__getitems__` already gathers it."""
    return batch
