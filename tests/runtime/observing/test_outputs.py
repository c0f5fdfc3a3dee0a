"""Which outputs are seen, and that modes are left in any order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stabletrain.runtime.internals import modes
from stabletrain.runtime.observing.outputs import Output, Outputs


def seen(module: nn.Module, *inputs: Tensor) -> list[tuple[str, str, bool, bool]]:
    found: list[Output] = []
    with Outputs(nn.ModuleDict({"m": module}), found.append):
        module(*inputs)
    return [(each.module, each.kind, each.again, each.of_function) for each in found]


def test_a_change_in_place_is_another_output() -> None:
    """Bug: ``nn.ReLU(inplace=True)`` returns its input, and is taken for what BatchNorm has returned."""
    x = torch.randn(3, 2)
    assert seen(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU(inplace=True), nn.Identity()), x) == [
        ("m.0", "", False, False),
        ("m.1", "relu", False, True),
        ("m.1", "relu", True, False),
        ("m.2", "relu", True, False),
        ("m", "relu", True, False),
    ]


class Catches(nn.Module):
    """Catches what a part of it raises."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.next = nn.Linear(3, 3), nn.LSTM(2, 2)

    def forward(self, x: Tensor) -> Any:
        try:
            self.part(x)
        except RuntimeError:
            x = F.gelu(x)
        return {"state": None, "x": self.next(x)}


def test_names_are_right_after_an_exception_and_outputs_may_be_nested() -> None:
    """Bugs: after an exception that a module catches, all names are those of the part that raised; a dictionary or
    an LSTM's tuple is not seen."""
    assert seen(Catches(), torch.randn(3, 2)) == [
        ("m", "", False, True),
        ("m.next", "", False, False),
        ("m", "", True, False),
    ]


def test_under_a_transform_nothing_is_kept() -> None:
    """Bug: a tensor of ``torch.func.vmap`` is read, and used after the transform has ended."""
    net = nn.Linear(2, 2)

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            return torch.func.vmap(self.net)(x)

    assert seen(Mapped(), torch.randn(3, 2)) == [("m", "", False, False)]


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inner", [True, False])
def test_a_mode_that_was_opened_later_stays_open(inner: bool) -> None:
    """Bug: closing ours within a mode of the module's closes that one, and leaves ours."""
    leave = modes.enter(Mode())
    with torch.device("meta"):
        if inner:
            leave()
        assert torch.zeros(1).is_meta
    assert not torch.zeros(1).is_meta
    leave()
    assert modes.open_function_modes() == []
