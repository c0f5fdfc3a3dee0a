"""The choice of units, without any process."""

import pytest
import sharded_modules as modules
import torch
from sharded_modules import Encoder
from torch import nn

from stabletrain import FSDP2Strategy, UserError
from stabletrain.strategies.units import choose, is_closed

LAYERS = [f"encoder.layers.{i}" for i in range(3)]


def names(module: nn.Module, units: object = None) -> list[str]:
    return list(choose(module, units).units)  # type: ignore[arg-type]


class Named(Encoder):
    _no_split_modules = ("Linear",)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(2))


def test_the_rules_are_tried_in_their_order() -> None:
    """Bugs: a given unit is ignored; what the module names is ignored; the repeated blocks are found twice, as lists
    within lists; a few small blocks are taken for the module."""
    assert names(Encoder()) == LAYERS
    assert names(Encoder(), "Linear") == ["encoder.layers.0.linear1", "encoder.layers.0.linear2",
                                          "encoder.layers.1.linear1", "encoder.layers.1.linear2",
                                          "encoder.layers.2.linear1", "encoder.layers.2.linear2", "head"]  # fmt: skip
    assert names(Named()) == names(Encoder(), "Linear")
    assert names(Encoder(), ["encoder.layers.[01]"]) == LAYERS[:2]
    assert names(Encoder(), [nn.TransformerEncoderLayer, "head"]) == [*LAYERS, "head"]
    assert names(Encoder(), lambda name, module: name == "head") == ["head"]
    assert names(Inner()) == ["blocks.0", "blocks.1"]
    assert names(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == []  # blocks have children
    large = nn.ModuleList([nn.Linear(100, 100), nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))])
    assert names(large) == []
    assert choose(Encoder()).share == pytest.approx(0.86, abs=0.01)


def test_shared_parts_are_no_units() -> None:
    """Bugs: a weight or a module that is used outside of its unit is sharded there; a block used twice is two units."""
    assert names(modules.SharedLayer()) == LAYERS[:2]
    assert names(modules.SharedNorm()) == LAYERS[:2]
    assert names(modules.SharedWeight()) == []  # one of three blocks is left, less than half of the parameters
    assert names(modules.Tied()) == LAYERS
    between = Encoder()
    between.encoder.layers[0].norm1 = between.encoder.layers[1].norm1
    assert [is_closed(between, layer) for layer in between.encoder.layers] == [False, False, True]


@pytest.mark.parametrize(
    ("units", "says"),
    [
        (["TransformerEncoderLayr"], "did you mean 'TransformerEncoderLayer'"),
        (["head", "nothing.*"], r"chosen by 'nothing.\*'"),
        ([], None),
        (lambda name, module: False, "no module of Encoder is chosen"),
        (["embedding"], r"the unit embedding shares a part .*\(head.weight\)"),
    ],
)
def test_units_that_cannot_be(units: object, says: str | None) -> None:
    """Bugs: a name with a typing error trains as one group, without a word; a tied weight is sharded in two places."""
    module = modules.Tied() if units == ["embedding"] else Encoder()
    if says is None:
        assert names(module, units) == []
        return
    with pytest.raises(UserError, match=says):
        choose(module, units)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"replicate": 0}, "replicate must be a whole number >= 1"),
        ({"replicate": True}, "replicate must be"),
        ({"timeout": float("inf")}, "timeout must be seconds > 0, or None"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"gather": "fp16"}, r"gather must be bf16 or None, got 'fp16' \(FSDP2Strategy\(gather=...\)\)"),
        ({"also": "generate"}, "also must be a list of names"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], says: str) -> None:
    """Bug: a value that fails after the processes have started, or has no effect."""
    with pytest.raises(UserError, match=says):
        FSDP2Strategy(**arguments)  # type: ignore[arg-type]


def test_the_options_have_every_argument_and_its_default() -> None:
    """Bug: an argument that the command line does not show, or a default that differs from a script's."""
    import inspect

    from stabletrain.config.compose import compose

    arguments = {k: p.default for k, p in inspect.signature(FSDP2Strategy).parameters.items()}
    arguments["also"] = []
    for option, changed in (("fsdp2", {}), ("zero2", {"reshard_after_forward": False}), ("hsdp", {"replicate": 2})):
        node = compose("char_gpt", [f"strategy={option}"]).config["strategy"]
        assert node == {"_target_": "stabletrain.FSDP2Strategy", **arguments, **changed}
    assert isinstance(FSDP2Strategy(), torch.nn.Module) is False
