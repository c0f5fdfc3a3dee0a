"""Which modules count as compiled."""

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn

from stabletrain.runtime.internals.compiled import is_compiled, uses_cuda_graphs


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Decorated(Net):
    @torch.compile(backend="eager")  # type: ignore[untyped-decorator]
    def inner(self) -> None:
        pass


class Static(Net):
    @staticmethod
    @torch.compile(backend="eager")  # type: ignore[untyped-decorator]
    def inner() -> None:
        pass


class Disabled(Net):
    @torch.compiler.disable
    def inner(self) -> None:
        pass


def in_part() -> nn.Module:
    net = Net()
    net.layer = torch.compile(net.layer, backend="eager")
    return net


def in_place() -> nn.Module:
    net = Net()
    net.layer.compile(backend="eager")
    return net


def a_function() -> nn.Module:
    net = Net()
    net.step = torch.compile(net.forward, backend="eager")
    return net


def a_disabled_function() -> nn.Module:
    net = Net()
    net.step = torch.compiler.disable(net.forward)
    return net


MADE: dict[Callable[[], nn.Module], bool] = {
    Net: False,
    Disabled: False,
    a_disabled_function: False,
    lambda: torch.compile(Net(), backend="eager"): True,  # type: ignore[dict-item,return-value]
    lambda: from_compiled(torch.compile(Net(), backend="eager")): True,  # type: ignore[arg-type]
    in_part: True,
    in_place: True,
    a_function: True,
    Decorated: True,
    Static: True,
}


@pytest.mark.parametrize(("make", "expected"), MADE.items())
def test_which_modules_are_compiled(make: Callable[[], nn.Module], expected: bool) -> None:
    """Bugs: a way of compiling, whose bits are others, that the record calls eager; a module that torch.compile is told
    to leave alone; a private attribute of torch or Lightning that is gone."""
    assert is_compiled(make()) is expected


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda net, **how: from_compiled(torch.compile(net, **how)), {"mode": "reduce-overhead"}),
        (lambda net, **how: in_part_of(net, torch.compile(net.layer, **how)), {"mode": "reduce-overhead"}),
        (lambda net, **how: net.layer.compile(**how) or net, {"options": {"triton.cudagraphs": True}}),
        (lambda net, **how: with_step(net, torch.compile(net.forward, **how)), {"mode": "max-autotune"}),
    ],
)
def test_which_modules_replay_cuda_graphs(make: Callable[..., nn.Module], expected: dict[str, object]) -> None:
    """Bug: one of the ways to compile is overlooked, or every compiled module is taken for one with graphs."""
    assert uses_cuda_graphs(make(Net(), **expected))
    assert not uses_cuda_graphs(make(Net(), backend="inductor"))
    assert not uses_cuda_graphs(make(Net(), backend="eager"))
    assert not uses_cuda_graphs(Net())


def in_part_of(net: Net, layer: nn.Module) -> Net:
    net.layer = layer  # type: ignore[assignment]
    return net


def with_step(net: Net, step: object) -> Net:
    net.step = step  # type: ignore[assignment]
    return net
