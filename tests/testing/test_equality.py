"""The comparison behind the checks and the kill tests: it misses no difference, and sees none in equal NaN."""

import math
from collections import deque

import numpy as np
import pytest
import torch

from stabletrain.core.statistics import Ema
from stabletrain.testing.checks.equality import difference, differences, nonfinite_numbers, same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),  # a counter that a file turned into a float
        ((1.0,), [1.0]),
        (Ema(1.0, 2.0), (1.0, 2.0)),
        ({"a": 1}, {"a": 1, "b": 2}),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64)),
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 2.0])),
        (torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan])),
        ([0.1 + 0.2], [0.3]),
        (0.0, -0.0),  # a sign that is lost
        (complex(0.0, -0.0), 0j),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([math.nan]), -torch.tensor([math.nan])),  # NaN of other bits
        (torch.tensor([math.nan]), torch.tensor([math.inf])),
        (torch.nn.Parameter(torch.ones(1)), torch.ones(1)),
        (torch.zeros(0), torch.zeros(0, 1)),
        (np.array([0.0]), np.array([-0.0])),
        (np.array([1.0]), np.array([1.0], dtype=np.float32)),
        (np.array([1.0, None]), np.array([2.0, None])),
        (deque([1], 2), deque([1], 3)),
        ({1, 2}, {1, 3}),
    ],
)
def test_differences_are_found(one: object, other: object) -> None:
    """Bug: a kind of difference, as of types, layouts or lengths, that counts as equal."""
    assert not same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (float("nan"), float("nan")),
        ({"a": [float("nan")]}, {"a": [float("nan")]}),
        (frozenset({(float("nan"), 1.0)}), frozenset({(float("nan"), 1.0)})),
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0])),
        (torch.tensor([1.0, math.nan]).bfloat16(), torch.tensor([1.0, math.nan]).bfloat16()),
        (torch.ones(2, 3).t(), torch.ones(3, 2)),
        (torch.tensor(True), torch.tensor(True)),
        (np.array([math.nan, None]), np.array([float("nan"), None])),
        (complex(math.nan, 1.0), complex(math.nan, 1.0)),
    ],
)
def test_equal_nan_is_equal(one: object, other: object) -> None:
    """Bug: NaN makes every comparison of states fail; or layout counts as a difference."""
    assert same(one, other)


@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf, -0.0])
def test_one_element_is_enough(at: int, value: float) -> None:
    """Bug: a comparison that ignores a position, or that a NaN elsewhere switches off."""
    one, other = torch.tensor([0.0, 0.0, math.nan]), torch.tensor([0.0, 0.0, math.nan])
    other[at] = value if at < 2 or not math.isnan(value) else 1.0
    assert not same(one, other)
    assert not same(one.tolist(), other.tolist())
    assert not same(one.numpy(), other.numpy())


def test_all_differences_are_named() -> None:
    """Bug: a report that ends at the first difference hides which kinds of state a resume gets wrong."""
    one = {"a": [1, 2, 3], "b": torch.ones(2), "c": 1, "d": 5}
    other = {"a": [1, 9], "b": torch.zeros(2), "c": 1.0, "e": 5}
    found = list(differences(one, other, "rank 0"))
    assert found == [
        "rank 0.a: 3 and 2 items",
        "rank 0.a[1]: 2 and 9",
        "rank 0.b differs",
        "rank 0.c: int 1 and float 1.0",
        "rank 0.d: only in one",
        "rank 0.e: only in other",
    ]


def test_the_path_is_named() -> None:
    """Bug: a difference deep in a state without its position."""
    assert difference({"a": [1, 2]}, {"a": [1, 3]}) == ".a[1]: 2 and 3"
    assert list(nonfinite_numbers({"a": Ema(1.0, math.inf)})) == [".a.var=inf"]
