"""State in 32 bits continues in 8 and back: the next update, what stays exact, and what is refused."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from state_bits import ADAMW, Make, Small, distance, of, through_a_file
from torch import Tensor, nn

from stabletrain.errors import UserError
from stabletrain.optim.conversion import converted
from stabletrain.optim.loading import loadable
from stabletrain.runtime.internals import quantized_state
from stabletrain.testing.checks.equality import differences

pytest.importorskip("bitsandbytes")

STEPS = 20
WIDE = of("torch.optim.AdamW", **ADAMW)
LION: dict[str, Any] = {"lr": 1e-4, "weight_decay": 1.0}
DECOUPLED: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "weight_decouple": True}
PAIRS: dict[str, tuple[Make, Make]] = {
    "adamw": (WIDE, of("stabletrain.AdamW8bit")),
    "adamw paged": (WIDE, of("stabletrain.PagedAdamW8bit")),
    "adamw fused": (of("torch.optim.AdamW", **ADAMW, fused=True), of("stabletrain.AdamW8bit")),
    "adam": (of("torch.optim.Adam"), of("stabletrain.Adam8bit")),
    "adamw bitsandbytes": (WIDE, of("bitsandbytes.optim.AdamW8bit", **ADAMW)),
    "adamw torchao": (WIDE, of("torchao.optim.AdamW8bit", **ADAMW)),
    "adamw torchao fp8": (WIDE, of("torchao.optim.AdamWFp8", **ADAMW)),
    "torchao, bitsandbytes": (of("torchao.optim.AdamW8bit", **ADAMW), of("stabletrain.AdamW8bit")),
    "torchao, fp8": (of("torchao.optim._AdamW", **ADAMW), of("torchao.optim.AdamWFp8", **ADAMW)),
    "momentum": (
        of("torch.optim.SGD", lr=0.1, momentum=0.8, weight_decay=5e-4),
        of("stabletrain.SGD8bit", momentum=0.5),
    ),
    "rmsprop": (of("torch.optim.RMSprop", lr=1e-3, alpha=0.9), of("stabletrain.RMSprop8bit")),
    "lion": (of("pytorch_optimizer.Lion", **LION), of("stabletrain.Lion8bit")),
    "ademamix": (
        of("pytorch_optimizer.AdEMAMix", **DECOUPLED, t_alpha_beta3=200),
        of("stabletrain.AdEMAMix8bit"),
    ),
}


def made(make: Make, groups: Any) -> Any:
    """An optimizer; skips the test if it cannot be trained here."""
    try:
        optimizer = make(groups)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    if quantized_state.is_torchao(optimizer) and os.environ.get("TORCHDYNAMO_DISABLE") != "1":
        pytest.skip("its step is compiled, which takes minutes on a CPU: set TORCHDYNAMO_DISABLE=1")
    return optimizer


def trained(make: Make, steps: int = STEPS, net: Small | None = None) -> Any:
    net = net or Small()
    optimizer = made(make, net.groups())
    net.steps(optimizer, 0, steps)
    return optimizer


def load(optimizer: Any, saved: Mapping[str, Any]) -> Any:
    optimizer.load_state_dict(converted(saved, optimizer))
    return optimizer


def plain(value: Any) -> Any:
    """Tensors of torchao taken apart."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
        return {name: getattr(value, name) for name in value.__tensor_flatten__()[0]}  # type: ignore[attr-defined]
    return value


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported")
def test_the_next_update_is_that_of_the_optimizer_before(name: str) -> None:
    """Bugs: a moment in the place of another one, quantized with the wrong table, lost; options that are the new run's;
    the count of steps starts again, so that the bias is corrected twice; 8 bits loaded into 8 bits are rounded again;
    embeddings are rounded."""
    wide, narrow = PAIRS[name]
    net = Small()
    first = trained(wide, net=net)
    saved, weights = through_a_file(first), copy.deepcopy(net.state_dict())
    expected = net.steps(first, STEPS, 1)

    def update(make: Make, state: Any) -> tuple[Tensor, Any, Any]:
        other = Small()
        other.load_state_dict(weights)
        optimizer = made(make, other.groups())
        if state is not None:
            load(optimizer, state)
        form = through_a_file(optimizer)
        return other.steps(optimizer, STEPS, 1), form, optimizer

    changed, form, optimizer = update(narrow, saved)
    returned, back, _ = update(wide, form)
    bound = (0.1, 0.995) if name == "lion" else (0.05, 0.999)  # its update is a sign, which rounding turns for some
    for got in (changed, returned):
        error, cosine = distance(got, expected)
        assert error <= bound[0]
        assert cosine >= bound[1]
    lost, _ = distance(update(narrow, None)[0], expected)
    assert lost >= 0.6  # the bound would notice a state that is lost
    assert form["state"][0].get("step", STEPS) == (1 if name == "momentum" else STEPS)  # torch's SGD does not count
    assert back["state"].keys() == saved["state"].keys()
    for key in ("step", "alpha", "momentum", "betas", "weight_decay", "kind"):
        for one, two in zip(saved["param_groups"], back["param_groups"], strict=True):
            assert one.get(key) == two.get(key)
    for one, two in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        assert float(one["lr"]) == pytest.approx(float(two["lr"]), rel=1e-7)
        assert one["kind"] == two["kind"]
    if name == "adamw":
        assert type(saved["state"][0]["step"]) is type(back["state"][0]["step"])
        for key in ("exp_avg", "exp_avg_sq"):  # embeddings and small tensors are exact
            assert torch.equal(saved["state"][0][key], back["state"][0][key])
            assert torch.equal(saved["state"][2][key], back["state"][2][key])
            assert not torch.equal(saved["state"][1][key], back["state"][1][key])


@pytest.mark.parametrize("name", ["adamw", "adamw torchao", "momentum", "ademamix"])
def test_8_bits_into_8_bits_is_exact(name: str) -> None:
    """Bug: state of the optimizer's own form is widened and quantized again, which changes 6 of 22 tensors; or it is
    another object than was saved, so that the resumed run differs from the uninterrupted one."""
    net, other = Small(), Small()
    one = trained(PAIRS[name][1], net=net)
    saved = through_a_file(one)
    two = made(PAIRS[name][1], other.groups())
    assert converted(saved, two) is saved
    other.load_state_dict(net.state_dict())
    two.load_state_dict(saved)
    assert not list(differences(plain(one.state_dict()), plain(two.state_dict())))
    assert torch.equal(net.steps(one, STEPS, 3), other.steps(two, STEPS, 3))
    assert not list(differences(plain(one.state_dict()), plain(two.state_dict())))


@pytest.mark.parametrize("name", ["adamw", "adamw bitsandbytes", "momentum", "lion", "ademamix"])
def test_8_bits_through_32_and_back_are_the_same_values(name: str) -> None:
    """Bug: a block whose largest element is negative has another scale, because the signed table ends at -0.993."""
    wide, narrow = PAIRS[name]
    net, other = Small(), Small()
    one = trained(narrow, net=net)
    middle = load(made(wide, Small().groups()), through_a_file(one))
    two = load(made(narrow, other.groups()), through_a_file(middle))
    tensors = 0
    for mine, theirs in zip(one.state.values(), two.state.values(), strict=True):
        for key in ("state1", "state2"):
            if key in mine:
                tensors += 1
                assert torch.equal(mine[key], theirs[key])
        values = [quantized_state.widened(each) for each in (mine, theirs)]
        assert all(torch.equal(values[0][key], values[1][key]) for key in values[0])
    assert tensors >= 7
    other.load_state_dict(net.state_dict())
    assert torch.equal(net.steps(one, STEPS, 3), other.steps(two, STEPS, 3))


def test_the_form_is_that_of_a_state_that_was_trained() -> None:
    """Bugs: an entry has another key, type or shape than after a step, and the kernel or a snapshot fails; the table of
    codes is copied for every parameter."""
    for name in ("adamw", "ademamix", "momentum"):
        wide, narrow = PAIRS[name]
        kept = trained(narrow, 1)
        optimizer = load(made(narrow, Small().groups()), through_a_file(trained(wide, 1)))
        pairs = zip(optimizer.state.values(), kept.state.values(), strict=True)
        for mine, theirs in pairs:
            assert mine.keys() == theirs.keys()
            for key, each in theirs.items():
                assert type(mine[key]) is type(each)
                if isinstance(each, Tensor):
                    assert (mine[key].dtype, mine[key].shape) == (each.dtype, each.shape), key
        assert optimizer.param_groups[0].keys() == kept.param_groups[0].keys()


def test_values_that_are_not_finite_stay_in_their_block() -> None:
    """Bug: one NaN or Inf in a moment makes other blocks useless, or is lost without a trace."""
    saved = through_a_file(trained(WIDE))
    saved["state"][1]["exp_avg"][3, 5] = float("nan")  # block 0 of 64
    optimizer = load(made(of("stabletrain.AdamW8bit"), Small().groups()), saved)
    back = converted(optimizer.state_dict(), made(WIDE, Small().groups()))["state"][1]["exp_avg"]
    rest = back.flatten()[256:]
    assert rest.isfinite().all()
    assert (rest - saved["state"][1]["exp_avg"].flatten()[256:]).norm() <= 0.05 * rest.norm()


def test_steps_as_numbers_and_parameters_by_name() -> None:
    """Bugs: a count that is a Python number, as older checkpoints have it, is taken for a moment; the order is that of
    the keys instead of the groups'; a parameter without a state gets that of its neighbour."""
    plain_state = through_a_file(trained(WIDE))
    named = copy.deepcopy(plain_state)
    names = [name for name, _ in Small().named_parameters()]
    named["state"] = {names[key]: {**each, "step": int(each["step"])} for key, each in plain_state["state"].items()}
    named["state"] = dict(sorted(named["state"].items(), reverse=True))
    for group in named["param_groups"]:
        group["params"] = [names[each] for each in group["params"]]
    expected, got = (
        made(of("stabletrain.AdamW8bit"), Small().groups()),
        made(of("stabletrain.AdamW8bit"), Small().groups()),
    )
    load(expected, plain_state)
    load(got, named)
    mine, theirs = got.state_dict()["state"], expected.state_dict()["state"]
    assert not list(differences(mine, theirs))
    del named["state"][names[1]]
    without = load(made(of("stabletrain.AdamW8bit"), Small().groups()), named)
    assert without.state_dict()["state"].keys() == theirs.keys() - {1}


REFUSED: dict[str, tuple[Make, Make, str]] = {
    "another algorithm": (WIDE, of("stabletrain.Lion8bit"), "Lion8bit: .* checkpoint of Lion.* got .* of AdamW"),
    "two in 8 bits": (
        of("stabletrain.AdamW8bit"),
        of("stabletrain.Lion8bit"),
        "Lion8bit: .* of Lion.* got bitsandbytes' state of AdamW",
    ),
    "one moment": (
        of("stabletrain.RMSprop8bit"),
        of("stabletrain.Lion8bit"),
        "Lion8bit: .* of Lion.* got bitsandbytes' state of RMSprop",
    ),
    "signs": (of("stabletrain.Lion8bit"), of("stabletrain.SGD8bit"), "got bitsandbytes' state of Lion"),
    "signs, back": (of("stabletrain.Lion8bit"), of("torch.optim.SGD", lr=0.1, momentum=0.9), "SGD: .* of Lion"),
    "adagrad": (of("bitsandbytes.optim.Adagrad8bit"), of("torch.optim.RMSprop"), "RMSprop: .* got bitsandbytes' state"),
    "ademamix": (WIDE, of("stabletrain.AdEMAMix8bit"), "AdEMAMix8bit: .* of AdEMAMix.* got .* of AdamW"),
    "no 8-bit form": (
        of("stabletrain.AdamW8bit"),
        of("torch.optim.RAdam"),
        "RAdam: expected a checkpoint of RAdam, got bitsandbytes' state of AdamW",
    ),
    "names of adamw": (of("torch.optim.RAdam"), of("stabletrain.AdamW8bit"), "AdamW8bit: .* got exp_avg, exp_avg_sq"),
    "8 bits, other in 32": (of("stabletrain.AdamW8bit"), of("torch.optim.SGD", momentum=0.9, lr=0.1), "SGD: .* AdamW"),
    "torchao 4 bits": (of("torchao.optim.AdamW4bit"), WIDE, "AdamW: .* got .* as torchao's OptimState4bit"),
    "amsgrad": (
        of("torch.optim.AdamW", amsgrad=True),
        of("stabletrain.AdamW8bit"),
        "has amsgrad=True, which AdamW8bit",
    ),
    "amsgrad, torchao": (of("torch.optim.AdamW", amsgrad=True), of("torchao.optim.AdamW8bit"), "has amsgrad=True"),
    "maximize": (of("torch.optim.AdamW", maximize=True), of("stabletrain.AdamW8bit"), "has maximize=True"),
    "maximize, torchao": (of("torch.optim.AdamW", maximize=True), of("torchao.optim.AdamW8bit"), "maximize=True"),
    "an L2 penalty": (
        of("torch.optim.Adam", weight_decay=0.1),
        of("stabletrain.Adam8bit"),
        "has decoupled_weight_decay=False, which Adam8bit cannot continue",
    ),
    "an L2 penalty, torchao": (
        of("torch.optim.Adam", weight_decay=0.1),
        of("torchao.optim.AdamW8bit"),
        "decoupled_weight_decay=False",
    ),
    "nesterov": (
        of("torch.optim.SGD", lr=0.1, momentum=0.9, nesterov=True),
        of("stabletrain.SGD8bit"),
        "nesterov=True",
    ),
    "dampening": (
        of("torch.optim.SGD", lr=0.1, momentum=0.9, dampening=0.5),
        of("stabletrain.SGD8bit"),
        "dampening=0.5",
    ),
    "momentum": (of("torch.optim.RMSprop", momentum=0.9), of("stabletrain.RMSprop8bit"), "RMSprop8bit"),
    "muon": (of("stabletrain.MuonAdamW"), of("stabletrain.AdamW8bit"), "got exp_avg, exp_avg_sq, momentum_buffer"),
    "to muon": (of("stabletrain.AdamW8bit"), of("stabletrain.MuonAdamW"), "MuonAdamW: expected a checkpoint of Muon"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_convert_is_one_message(name: str) -> None:
    """Bugs: a KeyError in the next step; moments of another algorithm taken for one's own; a gradient that was added is
    subtracted; a momentum that was scaled by 1 - dampening is taken for one that was not."""
    first, second, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as error:
        load(made(second, Small().groups()), through_a_file(trained(first, 1)))
    assert "\n" not in str(error.value)
    assert "config key optimizer" in str(error.value)


def test_another_architecture_is_one_message() -> None:
    """Bug: moments of other shapes are loaded, and the kernel reads beyond the end of a tensor."""
    deep, wide = nn.Linear(64, 64), nn.Linear(128, 64)
    for kinds in ((WIDE, of("stabletrain.AdamW8bit")), (of("stabletrain.AdamW8bit"), WIDE)):
        optimizer = kinds[0](wide.parameters())
        for p in wide.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        with pytest.raises(
            UserError, match=r"has the shape \(64, 128\), the parameter \(64, 64\).*another architecture"
        ):
            load(kinds[1](deep.parameters()), optimizer.state_dict())
        with pytest.raises(UserError, match=r"parameter groups of \[2\] parameters, this one of \[1\]"):
            load(kinds[1]([wide.weight]), optimizer.state_dict())


class Own(torch.optim.Optimizer):
    """Has a state of the user's own, with names as bitsandbytes'."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["state1"] = torch.zeros_like(p)


class Holder(Own):
    """Holds another optimizer, as ZeroRedundancyOptimizer does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.optim = of("bitsandbytes.optim.AdamW8bit")(self.param_groups)


def test_all_else_is_loaded_as_it_is() -> None:
    """Bugs: a state that nobody asked to convert is changed or refused; an optimizer around one in 8 bits is refused
    its own state; damage of a checkpoint is a traceback of this code."""
    states = {
        "32 bits": (through_a_file(trained(of("torch.optim.Adam"), 1)), WIDE),
        "own": (through_a_file(trained(Own, 1)), Own),
        "held": (through_a_file(trained(of("stabletrain.AdamW8bit"), 1)), Holder),
        "no state": (made(of("stabletrain.AdamW8bit"), Small().groups()).state_dict(), of("stabletrain.AdamW8bit")),
    }
    for saved, make in states.values():
        assert converted(saved, make(Small().groups())) is saved
    optimizer = made(of("stabletrain.AdamW8bit"), Small().groups())
    damaged: Any
    for damaged in ({}, {"optimizer_states": 3}, {"optimizer_states": [3, None, {"state": []}]}):
        assert loadable(damaged, [optimizer]) == damaged
    state = through_a_file(trained(WIDE, 1))
    for name, value in {"step": "x", "exp_avg": torch.ones(3), "betas": None}.items():
        damaged = copy.deepcopy(state)
        (damaged["param_groups"][0] if name == "betas" else damaged["state"][1])[name] = value
        with pytest.raises(UserError, match=r"AdamW8bit: .*config key resume"):
            loadable({"optimizer_states": [damaged]}, [optimizer])
