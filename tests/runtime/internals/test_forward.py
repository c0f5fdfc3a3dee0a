"""Wrappers of a module's forward pass."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from stabletrain.runtime.internals.forward import wrap_forward


class Layer(nn.Linear):
    """With whole numbers, whose sums do not depend on their order."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        nn.init.ones_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, x: torch.Tensor, times: float = 1.0) -> torch.Tensor:
        return super().forward(x) * times


def adding(number: float) -> Callable[..., Any]:
    return lambda module, inner, args, kwargs: inner(*args, **kwargs) + number


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_wrappers_are_removed_in_any_order(order: tuple[int, ...], patched: bool) -> None:
    """Bugs: the last one removed puts back one that was removed before it, and the module keeps that for ever; the
    user's own replacement of the forward pass is lost."""
    layer, x = Layer(), torch.ones(1, 2)
    if patched:
        layer.forward = lambda x: torch.zeros(1, 2)  # type: ignore[method-assign, assignment, misc]
    before = {**vars(layer)}
    plain = layer(x)
    numbers = [1.0, 2.0, 4.0]
    undo = [wrap_forward(layer, adding(each)) for each in numbers]
    assert torch.equal(layer(x), plain + sum(numbers))
    for index in order:
        undo[index]()
        undo[index]()
        numbers[index] = 0.0
        assert torch.equal(layer(x), plain + sum(numbers))
    assert vars(layer) == before


def test_a_copy_is_wrapped_and_uses_its_own_weights() -> None:
    """Bugs: the copy computes with the weights of the original; a caller that reads the signature finds ``*args``."""
    layer, x = Layer(), torch.ones(1, 2)
    undo = [wrap_forward(layer, adding(each)) for each in (1.0, 2.0)]
    assert list(inspect.signature(layer.forward).parameters) == ["x", "times"]
    twin = copy.deepcopy(layer)
    nn.init.zeros_(twin.weight)
    nn.init.zeros_(twin.bias)
    assert torch.equal(twin(x), torch.full((1, 2), 3.0))
    for each in undo:
        each()
    assert torch.equal(layer(x), Layer.forward(layer, x))
