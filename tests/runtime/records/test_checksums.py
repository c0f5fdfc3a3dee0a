"""Checksums of batches and weights: equal for equal bits, different for others, and nothing is used up or changed."""

import collections
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabletrain.runtime import rng
from stabletrain.runtime.records.checksums import Unreadable, checksum, weights_checksum


@dataclass
class Batch:
    rows: Tensor
    names: list[str] = field(default_factory=lambda: ["a"])


class Slots:
    __slots__ = ("rows",)

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows


class Callable_:
    """As torch_geometric's Data, which has attributes and can be called."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __call__(self) -> None:
        raise AssertionError("called")


def rows() -> Tensor:
    return torch.arange(12.0).reshape(3, 4)


def with_one_bit_more(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed[2, 3] += 2.0**-18
    return changed


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (torch.zeros(2), x),
    "dictionary": lambda x: {"x": [x], "y": 1},
    "user dictionary": lambda x: collections.UserDict(x=x),
    "dataclass": Batch,
    "slots": Slots,
    "callable": Callable_,
    "array": lambda x: x.numpy(),
    "array of objects": lambda x: np.array([{"x": x}, None], dtype=object),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "sparse columns": lambda x: x.to_sparse_csc(),
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged),
    "complex": lambda x: x.to(torch.complex64).conj(),
    "double": lambda x: x.double(),
    "not contiguous": lambda x: x.T,
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_changes_the_checksum(kind: str) -> None:
    """Bugs: content that no checksum sees; memory addresses, devices or strides in it, so that no two are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse and nested tensors are said to be new
        first, again, other = (KINDS[kind](each) for each in (rows(), rows(), with_one_bit_more(rows())))
    before = rng.capture()
    assert checksum(first) == checksum(again) == checksum(first)
    assert checksum(other) != checksum(first)
    assert torch.equal(rng.capture()["torch"], before["torch"])


def test_what_a_checksum_tells_apart() -> None:
    """Bugs: NaN, infinity or minus zero taken for another number; bytes without their shape or type; a text for a
    number; the order of a set, which is another one in every process."""
    x = rows()
    different = [x, -x, x.T, x.double(), x.flatten(), x.bfloat16(), [x], (x,), {"x": x}, {"y": x}, x.numpy(), None, 1]
    different += ["1", b"1", 1.0, True, float("nan"), float("inf"), torch.tensor(float("nan")), torch.tensor(1)]
    different += [torch.zeros(1), -torch.zeros(1), torch.zeros(0, 3), torch.zeros(0, 4), [], (), {}]
    found = [checksum(each) for each in different]
    assert len(set(found)) == len(found)
    assert checksum({"b", "a", "c"}) == checksum({"c", "b", "a"})
    assert checksum(x.T) == checksum(x.T.contiguous())


class Linked:
    """Holds others."""

    def __init__(self) -> None:
        self.others: list[Linked] = []


def test_objects_that_hold_each_other() -> None:
    """Bugs: an object that many others hold is read as often, so that linked samples hold up the run for hours; a
    batch of countless parts does."""
    linked = [Linked() for _ in range(40)]
    for each in linked:
        each.others = linked
    assert checksum(linked) == checksum(linked)
    vocabulary = list(range(50_000))
    assert checksum([vocabulary] * 100) == checksum([list(vocabulary)] + [vocabulary] * 99)
    with pytest.raises(Unreadable, match="more than 200,000 parts"):
        checksum([list(range(1000)) for _ in range(300)])


def test_nothing_is_used_up() -> None:
    """Bugs: an iterator in a batch is read; a batch that contains itself has no end."""

    def numbers() -> Iterator[int]:
        yield from range(3)

    reader, shown = numbers(), iter([1, 2])
    batch: list[Any] = [reader, shown, nn.Linear(1, 1), len]
    batch.append(batch)
    assert checksum(batch) == checksum(batch)
    assert (list(reader), list(shown)) == ([0, 1, 2], [1, 2])
    with pytest.raises(Unreadable):
        checksum(torch.zeros(2, device="meta"))


def test_weights() -> None:
    """Bugs: buffers, or names, that do not count; a compiled module, or tied weights, that seem to be another start."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    before = weights_checksum(net)
    assert weights_checksum(net) == before
    assert weights_checksum(torch.compile(net, backend="eager")) == before  # type: ignore[arg-type]
    net[1].running_mean.fill_(1e-9)
    buffers = weights_checksum(net)
    net[0].weight.data, net[2].weight.data = net[2].weight.data, net[0].weight.data
    assert len({before, buffers, weights_checksum(net)}) == 3
    net[0].weight = net[2].weight
    assert weights_checksum(net) == weights_checksum(net)
    with pytest.raises(Unreadable):
        weights_checksum(nn.LazyLinear(2))
