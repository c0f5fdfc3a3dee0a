"""Batches of any structure: their tensors, their samples, their labels, and a loader that returns the same ones."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stabletrain.runtime.windows.batches import tensors_of


def tensors(batch: Any) -> list[Tensor]:
    """The dense tensors in a batch, in the order of its structure; of others, few operations are defined.

    Args:
        batch: tensors in tuples, lists, mappings and dataclasses of any depth, or one alone.
    """
    return [each for each in tensors_of(batch) if each.layout is torch.strided and not each.is_nested]


def size(batch: Any) -> int:
    """Bytes of the tensors in a batch.

    Args:
        batch: see `tensors`.
    """
    return sum(each.numel() * each.element_size() for each in tensors(batch))


def inputs(batch: Any) -> Tensor | None:
    """The first tensor of a batch with at least one dimension, which is taken for the input; None: there is none.

    Args:
        batch: see `tensors`.
    """
    return next((each for each in tensors(batch) if each.ndim), None)


def labels(batch: Any) -> Tensor | None:
    """The last tensor with one whole number for each sample, if the batch has another tensor, too; else None.

    Args:
        batch: see `tensors`.
    """
    first, found = inputs(batch), tensors(batch)
    if first is None or len(found) < 2:
        return None
    fitting = (
        each
        for each in reversed(found)
        if each.ndim == 1 and len(each) == len(first) and not each.is_floating_point() and each is not first
    )
    return next(fitting, None)


def samples(batch: Any) -> list[bytes]:
    """A hash of each sample, over all tensors of the batch that have one row for each.

    Empty if no tensor has two dimensions: samples of a single number are often alike.

    Args:
        batch: see `tensors`.
    """
    first = inputs(batch)
    if first is None:
        return []
    parts = [each for each in tensors(batch) if each.ndim and len(each) == len(first)]
    if all(each.ndim < 2 for each in parts):
        return []
    rows = [_bytes(each) for each in parts]
    return [hashlib.blake2b(b"".join(row[i] for row in rows), digest_size=12).digest() for i in range(len(first))]


def _bytes(tensor: Tensor) -> list[bytes]:
    plain = tensor.detach().cpu().contiguous()
    if plain.numel() == 0:
        return [b""] * len(plain)
    array = plain.reshape(len(plain), -1).view(torch.uint8).numpy()
    return [row.tobytes() for row in array]


class SameBatches:
    """A train loader of a given number of batches: the same ones in the same order, again and again.

    Each is a copy, since a step may change its batch in place. The epoch ends early when `stop` was called, or when
    the time is over.

    Args:
        batches: to return; at least one.
        count: their number in an epoch.
        deadline: of `time.monotonic`, after which no further batch is returned.
        given: attributes of the user's loader for a module that asks for them.
    """

    def __init__(
        self, batches: Sequence[Any], count: int, deadline: float, given: Mapping[str, Any] | None = None
    ) -> None:
        self._batches, self._count, self._deadline = batches, count, deadline
        vars(self).update(given or {})
        self._stopped = False
        self.was_late = False
        """Whether the epoch ended because the time was over."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._count):
            if self._stopped:
                return
            if index and time.monotonic() > self._deadline:
                self.was_late = True
                return
            yield copy.deepcopy(self._batches[index % len(self._batches)])

    def stop(self) -> None:
        """Let the epoch end."""
        self._stopped = True
