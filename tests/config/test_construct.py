"""What is built from a config is what was checked: nodes only where an annotation asks for them, and no resolver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from stabletrain.config.annotations import argument_hints
from stabletrain.config.construct import DEPTH, instantiate, instantiate_arguments, parse, parse_arguments
from stabletrain.config.trust import TrustError
from stabletrain.errors import UserError

CLIP = {"_target_": "stabletrain.ClipNorm"}
MODEL = """
from __future__ import annotations
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
import torch
from lightning.pytorch import LightningModule
if TYPE_CHECKING:
    from torch.nn import Module as Net
class Model(LightningModule):
    def __init__(
        self, net: torch.nn.Module | None = None, nets: Sequence[torch.nn.Module] = (), named: Mapping[str, Net] = {},
        pair: tuple[int, torch.nn.Module] | None = None, make: Callable[..., torch.optim.Optimizer] | None = None,
        optimizer: torch.optim.Optimizer = None, anything: Any = None, thing: object = None, text: str = "", bare=None,
        call: Callable[[], None] = None, kind: type[torch.nn.Module] = None, missing: Missing = None,
        quoted: "torch.nn.Module | None" = None, **others: Any,
    ):
        super().__init__()
        self.given = dict(net=net, nets=nets, named=named, pair=pair, make=make, optimizer=optimizer, quoted=quoted)
"""
LINEAR = {"_target_": "torch.nn.Linear", "in_features": 2, "out_features": 3}
ADAM = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.5}


@pytest.fixture
def model(install: Callable[..., Path]) -> str:
    install("cool_models", {"__init__.py": MODEL})
    return "cool_models.Model"


def faults(node: dict[str, Any], key: str = "model") -> list[str]:
    return [f"{where}: {error}" for where, error in parse(node, key)[1]]


def test_nodes_are_built_where_the_annotation_names_their_class(model: str) -> None:
    """Bugs: a user's module gets a mapping for its network; a name that is imported for type checkers only."""
    node = {
        "_target_": model,
        "net": {"_target_": "torch.nn.Sequential", "_args_": [LINEAR, {"_target_": "torch.nn.ReLU"}]},
        "nets": [LINEAR, LINEAR],
        "named": {"a": LINEAR},
        "pair": [3, LINEAR],
        "make": ADAM,
        "quoted": LINEAR,
        "optimizer": ADAM,
    }
    given = instantiate(node, key="model").given
    assert isinstance(given["net"][1], torch.nn.ReLU)
    for each in (*given["nets"], given["named"]["a"], given["pair"][1]):
        assert isinstance(each, torch.nn.Linear)
    assert given["nets"][0] is not given["nets"][1]
    assert given["make"].func is given["optimizer"].func is torch.optim.AdamW


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[(name, LINEAR) for name in ("anything", "thing", "text", "bare", "call", "kind", "missing", "others")],
        ("anything", [LINEAR]),
        ("anything", {"deep": [LINEAR]}),
        ("nets", LINEAR),
        ("nets", [[LINEAR]]),
        ("named", {"a": [LINEAR]}),
        ("pair", [LINEAR, 3]),
        ("make", {**ADAM, "_partial_": False}),
        ("net", {"_target_": "torch.PyTorchFileWriter", "_args_": ["PWNED"]}),
        ("net", {"_target_": "torch.nn.functional.relu"}),
        ("net", {"_target_": "os.system", "command": "touch PWNED"}),
        ("net", {**LINEAR, "bias": {"_target_": "torch.nn.Identity"}}),
        ("nets", [LINEAR, {**LINEAR, "in_features": {"a": [{"_target_": "os.system", "command": "touch PWNED"}]}}]),
    ],
)
def test_nodes_elsewhere_are_refused_with_their_key(model: str, argument: str, value: Any) -> None:
    # `Any`, `object`, `Callable` and no annotation would accept whatever a trusted package happens to contain
    (found,) = faults({"_target_": model, argument: value})
    assert found.startswith(f"model.{argument}")
    assert "got a " in found or "may not be built" in found


def test_all_is_checked_before_anything_is_built(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: nodes are built from the inside out, the bad one last."""
    built: list[object] = []
    monkeypatch.setattr(torch.nn.ReLU, "__init__", lambda self: built.append(self))
    node = {"_target_": model, "nets": [{"_target_": "torch.nn.ReLU"}, {"_target_": "os.system"}]}
    with pytest.raises(TrustError, match=r"model\.nets\[1\]\._target_: 'os\.system'"):
        instantiate(node, key="model")
    assert not built


@pytest.mark.parametrize("text", ["${a}", "x${oc.env:HOME}", "\\${a}", "${oc.create:{_target_:psutil.Popen}}"])
def test_text_is_not_resolved_a_second_time(model: str, text: str) -> None:
    """Bug: Hydra's `instantiate` resolves what was plain text when it was checked."""
    for node, key in (
        ({"text": text}, "model.text"),
        ({"nets": [text]}, "model.nets[0]"),
        ({"anything": {text: 1}}, "model.anything"),
        ({"anything": {"a": [{"b": text}]}}, "model.anything.a[0].b"),
        ({"_args_": [text]}, "model._args_[0]"),
    ):
        (found,) = faults({"_target_": model, **node})
        assert found.startswith(f"{key}: expected a resolved value, got ")


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({**CLIP, "_partial_": True}, "plugins.clip._partial_: expected false"),
        ({**CLIP, "_partial_": "yes"}, "plugins.clip._partial_: expected true or false, got 'yes'"),
        ({**CLIP, "_recursive_": False}, "plugins.clip._recursive_: expected true"),
        ({**CLIP, "_args_": 3}, "plugins.clip._args_: expected a list, got 3"),
        ({**CLIP, 3: 4}, "plugins.clip: expected names of arguments as keys"),
        ({**CLIP, "max_norm": torch.ones(1)}, "plugins.clip.max_norm: expected a mapping, list, text, number"),
        ({"_target_": "stabletrain.ClipNorm", "max_norm": b"x"}, "plugins.clip.max_norm: expected a mapping, list"),
        ({"_target_": ["a"]}, "plugins.clip._target_: expected the dotted name of a class, got ['a']"),
        ({"_target_": "lightning.pytorch.Callback"}, "plugins.clip._target_: expected a subclass of Callback"),
    ],
)
def test_odd_nodes_are_refused(node: dict[str, Any], words: str) -> None:
    """Bug: a traceback, or a value that is silently ignored."""
    assert faults(node, "plugins.clip")[0].startswith(words)


def test_an_optimizer_lacks_its_parameters() -> None:
    """Bug: an optimizer without _partial_ is a TypeError in the worker."""
    assert faults({"_target_": "torch.optim.SGD"}, "optimizer") == [
        "optimizer._partial_: expected true, since the parameters are passed later; add it"
    ]


@pytest.mark.parametrize("deep", [DEPTH + 2, 5000])
def test_nesting_is_bounded(deep: int) -> None:
    """Bug: a RecursionError."""
    value: Any = 1
    for _ in range(deep):
        value = [value]
    (found,) = faults({**CLIP, "max_norm": value}, "plugins.clip")
    assert f"expected at most {DEPTH} levels" in found


def test_a_bomb_of_aliases_is_refused_at_once() -> None:
    """Bug: ten lines of YAML that stand for billions of values keep the check busy for minutes."""
    value: Any = [1] * 10
    for _ in range(12):
        value = [value] * 10
    assert len(faults({**CLIP, "max_norm": value}, "plugins.clip")) == 1


def test_a_node_without_a_target_is_refused() -> None:
    for node in ({}, None, 3, [CLIP]):
        (found,) = faults(node, "model")  # type: ignore[arg-type]
        assert found.startswith("model: expected _target_ and its arguments")


def test_what_a_constructor_raises_arrives_unwrapped() -> None:
    # the worker decides by the exception's class
    with pytest.raises(UserError, match="max_norm"):
        instantiate({**CLIP, "max_norm": -1.0}, key="plugins.clip")


def test_containers_arrive_as_plain_python() -> None:
    # a ListConfig in a callback breaks its checkpoint
    made = instantiate({"_target_": "torch.optim.AdamW", "_partial_": True, "betas": [0.9, 0.95]}, key="optimizer")
    assert made.keywords == {"betas": [0.9, 0.95]}
    assert type(made.keywords["betas"]) is list


def test_the_annotations_of_the_trainer_serve_for_its_arguments() -> None:
    """Bug: a class of any kind in trainer.profiler; a node in an argument that takes numbers; one in a list."""
    csv = "lightning.pytorch.loggers.CSVLogger"
    environment = "lightning.pytorch.plugins.environments.LightningEnvironment"
    given = {
        "profiler": {"_target_": "lightning.pytorch.profilers.SimpleProfiler"},
        "plugins": [{"_target_": environment}, {"_target_": "lightning.pytorch.plugins.io.TorchCheckpointIO"}],
        "strategy": {
            "_target_": "lightning.pytorch.strategies.DDPStrategy",
            "accelerator": {"_target_": "lightning.pytorch.accelerators.CPUAccelerator"},
        },
        "max_steps": 3,
    }
    made = instantiate_arguments(Trainer, given, key="trainer")
    assert [type(each).__name__ for each in made["plugins"]] == ["LightningEnvironment", "TorchCheckpointIO"]
    assert type(made["strategy"].accelerator).__name__ == "CPUAccelerator"
    wrong = {"profiler": {"_target_": csv}, "plugins": [{"_target_": csv}], "max_steps": CLIP, "no_argument": CLIP}
    keys = [key for key, _ in parse_arguments(Trainer, wrong, "trainer")[1]]
    assert keys == ["trainer.profiler", "trainer.plugins[0]", "trainer.max_steps", "trainer.no_argument"]


def test_overloads_and_texts_are_read() -> None:
    """Bug: `Sequential` has its annotation in an overload only, `AsyncCheckpointIO` and `ModuleList` in a text."""
    from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO

    assert argument_hints(torch.nn.Sequential)["*args"] == [torch.nn.Module]
    assert CheckpointIO in argument_hints(AsyncCheckpointIO)["checkpoint_io"]
    assert "Module" in str(argument_hints(torch.nn.ModuleList)["modules"][0])


def test_a_time_may_be_built() -> None:
    """Bug: the timeout of a process group cannot be set."""
    from lightning.pytorch import Trainer

    timeout = {"_target_": "datetime.timedelta", "seconds": 30}
    node = {"_target_": "lightning.pytorch.strategies.DDPStrategy", "timeout": timeout}
    made = instantiate_arguments(Trainer, {"strategy": node}, key="strategy")["strategy"]
    assert made._timeout.total_seconds() == 30
