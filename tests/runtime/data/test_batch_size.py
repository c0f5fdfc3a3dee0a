"""The memory of a batch is found in whatever a loader returns."""

from collections import UserDict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from stabletrain.runtime.data.batch_size import batch_bytes

BIG = torch.zeros(1000)


class Movable:
    """A batch of its own class, as libraries for graphs and texts have them."""

    def __init__(self) -> None:
        self.x, self.meta = BIG, {"name": "ab"}
        self.myself = self

    def to(self, device: Any) -> "Movable":
        return self


class Lazy:
    """Reads a file when it is iterated."""

    def __init__(self) -> None:
        self.x, self.model = BIG, torch.nn.Linear(500, 500)

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Any:
        raise AssertionError("read")


class Slotted:
    __slots__ = ("empty", "x")

    def __init__(self) -> None:
        self.x = BIG


@dataclass
class Fields:
    x: Tensor
    y: float = 1.0


class Pair(NamedTuple):
    x: Tensor
    y: int


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (BIG, 4000),
        ([BIG, (BIG.clone(), {"a": np.zeros(10)})], 8080),
        (UserDict(x=BIG), 4000),
        (deque([BIG]), 4000),
        (Movable(), 4002),
        (Slotted(), 4000),
        (Lazy(), 4000),
        (Fields(BIG), 4000),
        (Pair(BIG, 1), 4000),
        ({"x": BIG, "same": BIG}, 4000),
        (["text", b"bytes", 3, None], 9),
        ([], 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_batch(batch: Any, expected: int) -> None:
    """Bugs: a batch with a class of its own taken for 0 bytes; one tensor counted twice; a cycle that never ends; a
    file read, or a model counted, only because a batch refers to it."""
    assert batch_bytes(batch) == expected
