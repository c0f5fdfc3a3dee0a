"""Options of the groups, what the module itself exempts, layers, errors, and the table."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabletrain.errors import UserError
from stabletrain.optim.build import build_optimizer
from stabletrain.optim.groups import check_groups, parameter_groups
from stabletrain.optim.options import GroupOptions, group_options
from stabletrain.optim.table import group_table
from stabletrain.workloads.gpt import GPT


def gpt(*, tied: bool = False) -> GPT:
    return GPT(3, 2, 8, 4, 10, 0.0, False, tied)


def by_name(module: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    names = {id(each): name for name, each in module.named_parameters()}
    return {names[id(each)]: group.get(key) for group in groups for each in group["params"]}


def test_the_module_exempts_parameters_from_decay() -> None:
    """Bugs: names of a nested module taken for names of the whole; the flag of Mamba; a wrapper in the name."""

    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 3))
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            self.flagged = nn.Linear(3, 3, bias=False)
            self.flagged.weight._no_weight_decay = True  # type: ignore[assignment]

        def no_weight_decay(self) -> set[str]:
            return {"table", "blocks.0*", "dist_token"}

    wrapped = nn.Module()
    wrapped._orig_mod = nn.ModuleDict({"backbone": Backbone(), "head": nn.Linear(3, 1)})
    groups = parameter_groups(wrapped, weight_decay=0.1)
    decays = {
        name.removeprefix("_orig_mod."): decay for name, decay in by_name(wrapped, groups, "weight_decay").items()
    }
    assert [name for name, decay in decays.items() if decay] == ["backbone.blocks.1.weight", "head.weight"]
    again = parameter_groups(wrapped, weight_decay=0.1, overrides=[{"pattern": "table", "decay": True}])
    assert by_name(wrapped, again, "weight_decay")["_orig_mod.backbone.table"] == 0.1


def test_overrides_in_their_order() -> None:
    """Bugs: the last match wins; a tied weight that is found under one of its names only; ``weight_decay`` ignored
    where the kind does not decay; frozen parameters that come back."""
    module = gpt(tied=True)
    module.position.weight.requires_grad_(False)
    groups = parameter_groups(
        module,
        weight_decay=0.1,
        lr=0.5,
        overrides=[
            {"pattern": r"^head", "weight_decay": 0.3, "lr_scale": 2.0},
            {"pattern": r"mlp\.0", "decay": False},
            {"pattern": r"mlp|token", "lr_scale": 0.5},
        ],
    )
    decays, rates = by_name(module, groups, "weight_decay"), by_name(module, groups, "lr")
    assert "position.weight" not in decays
    assert (decays["token.weight"], rates["token.weight"]) == (0.3, 1.0)
    assert (decays["blocks.0.mlp.0.weight"], rates["blocks.0.mlp.0.weight"]) == (0.0, None)
    assert (decays["blocks.0.mlp.2.weight"], rates["blocks.0.mlp.2.weight"]) == (0.1, 0.25)
    assert (decays["blocks.0.mlp.2.bias"], rates["blocks.0.mlp.2.bias"]) == (0.0, 0.25)


def test_embeddings_decay_and_keep_their_bits_if_asked() -> None:
    """Bugs: ``decay_embeddings`` without effect, or on biases too; a key that no optimizer asked for."""
    groups = parameter_groups(gpt(), weight_decay=0.1)
    assert not any("optim_bits" in group for group in groups)
    groups = parameter_groups(gpt(), weight_decay=0.1, decay_embeddings=True, embedding_bits=32)
    found = {group["kind"]: (group["weight_decay"], group.get("optim_bits")) for group in groups}
    assert found == {"weight": (0.1, None), "embedding": (0.1, 32), "norm": (0.0, None), "bias": (0.0, None)}


def test_rates_decay_from_the_output_to_the_input() -> None:
    """Bugs: counted from the input; the head in a block; a list inside of a block taken for the blocks."""
    module = gpt()
    rates = by_name(module, parameter_groups(module, weight_decay=0.1, lr=1.0, layer_decay=0.5), "lr")
    assert rates["head.weight"] is None
    assert rates["norm.weight"] is None
    expected = {"blocks.2": 0.5, "blocks.1": 0.25, "blocks.0": 0.125, "token": 0.0625, "position": 0.0625}
    for start, rate in expected.items():
        assert {each for name, each in rates.items() if name.startswith(start)} == {rate}
    pair = nn.ModuleDict({"encoder": gpt(), "decoder": gpt()})
    with pytest.raises(UserError, match=r"param_groups.layers: .*encoder.blocks, decoder.blocks|decoder.blocks, enc"):
        parameter_groups(pair, weight_decay=0.1, lr=1.0, layer_decay=0.5)
    chosen = parameter_groups(pair, weight_decay=0.1, lr=1.0, layer_decay=0.5, layers="encoder.blocks")
    assert by_name(pair, chosen, "lr")["encoder.blocks.0.mlp.0.weight"] == 0.125


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LazyLinear(3)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"overrides": [{"pattern": "hed", "decay": False}]}, r"overrides\[0\].pattern: 'hed' matches no parameter"),
        ({"overrides": [{"pattern": "(", "decay": False}]}, r"overrides\[0\].pattern: expected a regular expression"),
        ({"overrides": [{"pattern": 3, "decay": False}]}, r"overrides\[0\].pattern: expected a regular expression"),
        ({"overrides": [{"pattern": "head", "lr": 0.1}]}, r"overrides\[0\]: expected a mapping"),
        ({"overrides": [{"pattern": "head"}]}, r"overrides\[0\]: it changes nothing"),
        ({"overrides": [{"pattern": "head", "decay": 0.1}]}, r"overrides\[0\].decay: expected true or false"),
        ({"overrides": [{"pattern": "head", "weight_decay": -1}]}, r"overrides\[0\].weight_decay: expected a number"),
        ({"overrides": [{"pattern": "head", "lr_scale": float("nan")}]}, r"overrides\[0\].lr_scale: expected a number"),
        ({"overrides": [{"pattern": "head", "decay": False, "weight_decay": 0.1}]}, r"overrides\[0\]: decay is false"),
        ({"overrides": {"pattern": "head", "decay": False}}, "overrides: expected a list"),
        ({"overrides": "head"}, "overrides: expected a list"),
        ({"layer_decay": 0.0}, "layer_decay: expected a number above 0"),
        ({"layer_decay": float("nan")}, "layer_decay: expected a number above 0"),
        ({"layer_decay": 0.5}, "need the optimizer's learning rate"),
        (
            {"layer_decay": 0.5, "layers": "body", "lr": 1.0},
            "layers: expected the name of a list of blocks, got 'body'",
        ),
        ({"layers": 3}, "layers: expected the name"),
        ({"decay_embeddings": 1}, "decay_embeddings: expected true or false"),
    ],
)
def test_a_mistake_is_one_message_with_its_key(options: dict[str, Any], text: str) -> None:
    """Bugs: a traceback of re or of an operator; an expression that matches nothing and changes nothing."""
    with pytest.raises(UserError, match=rf"^param_groups[.:].*{text}|^param_groups: .*{text}|^param_groups\.{text}"):
        parameter_groups(gpt(), weight_decay=0.1, **options)


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_modules_without_groups_are_one_message() -> None:
    """Bugs: torch's "empty parameter list"; the error of a tensor without a shape; a bare string as a set of names."""
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for module, text in ((frozen, "no parameter is trained"), (nn.Identity(), "no parameter"), (Lazy(), "lazy module")):
        with pytest.raises(UserError, match=text):
            parameter_groups(module, weight_decay=0.1)
    odd = nn.Linear(2, 2)
    odd.no_weight_decay = "weight"  # type: ignore[assignment]
    with pytest.raises(UserError, match="no_weight_decay: expected a set"):
        parameter_groups(odd, weight_decay=0.1)
    with pytest.raises(UserError, match="needs a ModuleList or Sequential"):
        parameter_groups(nn.Linear(2, 2), weight_decay=0.1, lr=1.0, layer_decay=0.5)


def test_every_parameter_is_in_one_group() -> None:
    """Bugs: an optimizer that loses parameters, or has one twice; the message names none of them."""
    module = nn.Linear(2, 2)
    check_groups(module, [{"params": [module.weight]}, {"params": [module.bias]}])
    with pytest.raises(UserError, match="1 is in no group: bias"):
        check_groups(module, [{"params": [module.weight]}])
    with pytest.raises(UserError, match="1 is in two groups: weight"):
        check_groups(module, [{"params": [module.weight, module.bias]}, {"params": [module.weight]}])


class Lossy(torch.optim.SGD):
    """An optimizer that trains its first group only."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(list(params)[:1], lr, weight_decay=weight_decay)


def test_building_with_any_optimizer() -> None:
    """Bugs: an optimizer without weight decay gets a key that it does not know, or several groups that it refuses."""
    options = GroupOptions()
    assert len(build_optimizer(gpt(), torch.optim.LBFGS, options).param_groups) == 1
    assert "weight_decay" not in build_optimizer(gpt(), torch.optim.Rprop, options).param_groups[0]
    with pytest.raises(UserError, match="in no group"):
        build_optimizer(gpt(), Lossy, options)
    scaled = group_options("param_groups", layer_decay=0.5)
    assert {group["lr"] for group in build_optimizer(gpt(), torch.optim.Rprop, scaled).param_groups} == {
        0.01 * 0.5**i for i in range(5)
    }


class PassesOn(torch.optim.AdamW):
    """An optimizer whose signature does not show its arguments."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)


def test_arguments_that_are_passed_on_are_seen() -> None:
    """Bug: no groups, since the class does not seem to have a weight decay."""
    for make, decay in ((PassesOn, 0.01), (partial(PassesOn, weight_decay=0.3, lr=0.5), 0.3)):
        groups = build_optimizer(gpt(), make, GroupOptions()).param_groups
        assert [(g["kind"], g["weight_decay"]) for g in groups][:2] == [("weight", decay), ("embedding", 0.0)]


class AdamW8bit(torch.optim.AdamW):
    """As one of bitsandbytes: its name and arguments say how many bits its state has."""


def test_the_table_shows_every_group() -> None:
    """Bugs: a frozen parameter that is not mentioned; bits of the parameter instead of those of its state."""
    module = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.LayerNorm(64))
    module[2].bias.requires_grad_(False)
    groups = parameter_groups(module, weight_decay=0.1, embedding_bits=32)
    optimizer = AdamW8bit(groups, lr=1e-3)
    lines = [line.split() for line in group_table(module, optimizer).splitlines()]
    assert lines[0] == ["group", "tensors", "elements", "decay", "rate", "state", "bits", "for", "example"]
    assert lines[1] == ["weight", "1", "4,096", "0.1", "0.001", "8", "1.weight"]
    assert lines[2] == ["embedding", "1", "6,400", "0", "0.001", "32", "0.weight"]
    assert lines[3] == ["norm", "1", "64", "0", "0.001", "32", "2.weight"]
    assert lines[4] == ["bias", "1", "64", "0", "0.001", "32", "1.bias"]
    assert lines[5] == ["frozen", "1", "64", "-", "-", "-", "2.bias"]
    loss: Tensor = module(torch.zeros(1, dtype=torch.long)).sum()
    loss.backward()
    optimizer.step()
    assert group_table(module, optimizer).splitlines()[1].split()[5] == "32"  # as its state says
