"""Every option of ``optimizer`` builds, trains a small character GPT, and nothing else of the packages is accepted."""

import importlib.util
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader

from stabletrain import SkipNonFinite
from stabletrain.config import discovery
from stabletrain.config.construct import instantiate
from stabletrain.config.trust import OPTIMIZERS, TargetError, TrustError, resolve
from stabletrain.config.validate import check_node
from stabletrain.errors import UserError
from stabletrain.extras import pip_line
from stabletrain.launch.assemble import switching
from stabletrain.optim.build import Arguments
from stabletrain.optim.groups import parameter_groups
from stabletrain.runtime.internals.packages import Callback
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads.char_gpt import CharGPT

NODES = {name: discovery.content(option) for name, option in discovery.groups()["optimizer"].items() if name != "none"}
FUSED = ("adagrad", "adam", "adamw", "momentum", "nesterov", "sgd")
RATES = {"adagrad": 0.05, "sgd": 0.3, "momentum": 0.1, "nesterov": 0.1, "sgd_8bit": 0.1, "lamb": 0.02}
OWN_RATES = ("adafactor", "muon", "prodigy", "sgd_schedulefree", "soap")


def node(name: str, **values: Any) -> dict[str, Any]:
    package = NODES[name]["_target_"].split(".")[0]
    if name.endswith("_ao"):
        pytest.importorskip(package)
        if os.environ.get("TORCHDYNAMO_DISABLE") != "1":
            pytest.skip("its step is compiled, which takes minutes on a CPU: set TORCHDYNAMO_DISABLE=1")
    return {**NODES[name], **values}


class Gpt(CharGPT):
    def __init__(self, make: Any) -> None:
        torch.manual_seed(0)
        super().__init__(vocab_size=24, layers=1, heads=2, width=32, context=16, sample_length=0)
        self.make = make

    def configure_optimizers(self) -> Any:
        decay = Arguments(self.make).value("weight_decay")
        return self.make(parameter_groups(self, weight_decay=decay or 0.0))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses = [*getattr(self, "losses", []), float(outputs["loss"])]


def texts(count: int) -> DataLoader[Any]:
    """Tokens that follow from the one before, so that a model learns them in a few steps."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, 24, (count, 8, 1), generator=generator)
    return DataLoader(list((starts + 5 * torch.arange(17)) % 24), batch_size=None)  # type: ignore[arg-type]


def trained(config: dict[str, Any], steps: int, folder: Path) -> list[float]:
    seed_everything(0, verbose=False)
    module = Gpt(instantiate(config, key="optimizer"))
    switch = [instantiate(each, key="plugins.averaging") for each in switching({"optimizer": config}).values()]
    callbacks: list[Callback] = [SkipNonFinite(), *switch]
    trainer = quiet_trainer(*callbacks, max_steps=steps, default_root_dir=folder)
    with warnings.catch_warnings():
        for text in ("Paged optimizers are not supported on CPU", ".*does not have many workers", ".*no `val_data"):
            warnings.filterwarnings("ignore", text)
        trainer.fit(module, texts(steps))
    return module.losses


def rated(name: str) -> dict[str, Any]:
    """The option with a rate for a model that is this small."""
    rate = RATES.get(name, 1e-3 if "lion" in name else 3e-3)
    return node(name) if name in OWN_RATES else node(name, lr=rate)


@pytest.mark.parametrize("name", NODES)
def test_an_option_trains(name: str, tmp_path: Path) -> None:
    """Bugs: an argument that its class does not know; a default with which nothing is learned; a step that raises."""
    config = rated(name)
    assert not list(check_node(config, "optimizer"))
    losses = trained(config, 40, tmp_path)
    assert len(losses) == 40
    fall = 0.0 if name == "prodigy" else 0.1  # its estimate of the rate needs more steps to grow
    assert sum(losses[-4:]) / 4 < sum(losses[:4]) / 4 - fall, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", NODES)
def test_an_option_trains_for_120_steps(name: str, tmp_path: Path) -> None:
    """Bug: a defect that only many steps show, such as a reset of moments, or 8-bit state that drifts."""
    losses = trained(rated(name), 120, tmp_path)
    assert len(losses) == 120
    assert sum(losses[-8:]) / 8 < losses[0] - 0.5, (losses[0], losses[-8:])


def test_fused_where_there_is_a_kernel_and_only_there() -> None:
    """Bugs: decisions on the host where the device could make them; ``fused=true`` for a class that refuses it."""
    fused = {name for name, each in NODES.items() if each.get("fused")}
    assert fused == {*FUSED}
    for name in fused:
        instantiate(node(name), key="optimizer")([nn.Parameter(torch.zeros(2))])
    assert not any("capturable" in each for each in NODES.values())
    assert (NODES["sgd"]["momentum"], NODES["momentum"]["nesterov"], NODES["nesterov"]["nesterov"]) == (
        0.0,
        False,
        True,
    )


def test_the_options_of_other_packages_and_nothing_else_are_accepted() -> None:
    """Bug: one trusted package lets a config build all its classes, of which some start or write something."""
    named = {str(each["_target_"]) for each in NODES.values()}
    assert named - OPTIMIZERS == {each for each in named if each.split(".")[0] in ("torch", "stabletrain")}
    assert named >= OPTIMIZERS
    for target in ("pytorch_optimizer.Muon", "pytorch_optimizer.optimizer.lion.Lion", "optimi.SGD", "muon.Muon"):
        with pytest.raises(TrustError, match="is not trusted"):
            resolve(target, [torch.optim.Optimizer])


@pytest.mark.parametrize("name", ["lion", "soap", "adamw_schedulefree", "adamw_kahan", "muon", "adamw_8bit", "adam"])
def test_an_unknown_argument_is_named(name: str) -> None:
    """Bug: pytorch-optimizer's classes take any argument and ignore those that they do not know."""
    (problem,) = check_node(node(name, weight_decey=0.1), "optimizer")
    assert problem.key == "optimizer.weight_decey"
    assert "did you mean 'weight_decay'" in problem.text


def test_a_missing_package_gives_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a traceback for a package that is an extra; a hint that names PyPI's ``muon``, an unrelated package."""
    find = importlib.util.find_spec
    wanted = {"pytorch_optimizer": "optim", "schedulefree": "schedulefree", "optimi": "kahan", "torchao": "torchao"}
    for package, extra in wanted.items():
        assert pip_line(package) == f'pip install "stabletrain[{extra}]"'
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(TargetError, match=r"pip install .stabletrain\[optim\]"):
        resolve("pytorch_optimizer.Lion", [torch.optim.Optimizer])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    from stabletrain_plugins.quantize_moments.bits import bitsandbytes_class

    with pytest.raises(UserError, match=r"needs the package bitsandbytes.*stabletrain\[bitsandbytes\]"):
        bitsandbytes_class("AdamW8bit")([nn.Parameter(torch.zeros(2))])
    assert pip_line("muon") is None
