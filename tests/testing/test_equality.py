"""The comparison behind the checks must neither miss a difference nor see one in equal NaN."""

import math

import pytest
import torch

from stabletrain.core.statistics import Ema
from stabletrain.testing.checks.equality import difference, nonfinite_numbers, same


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
    ],
)
def test_differences_are_found(one: object, other: object) -> None:
    assert not same(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (float("nan"), float("nan")),
        ({"a": [float("nan")]}, {"a": [float("nan")]}),
        (frozenset({(float("nan"), 1.0)}), frozenset({(float("nan"), 1.0)})),
        (torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0])),
    ],
)
def test_equal_nan_is_equal(one: object, other: object) -> None:
    assert same(one, other)


def test_the_place_is_named() -> None:
    assert difference({"a": [1, 2]}, {"a": [1, 3]}) == ".a[1]: 2 and 3"
    assert list(nonfinite_numbers({"a": Ema(1.0, math.inf)})) == [".a.var=inf"]
