"""Callbacks have the arguments of a dataclass, and OmegaConf takes none for a structured config."""

import copy
import dataclasses
import inspect
import pickle
from dataclasses import dataclass

import hydra
import pytest
from lightning.pytorch import Callback
from omegaconf import OmegaConf
from omegaconf._utils import is_structured_config

import stabletrain as st
from stabletrain.core.outcome import Outcome
from stabletrain.runtime.guard.callbacks import GuardMember
from stabletrain.runtime.guard.transform import TransformCallback
from stabletrain_plugins.clip_norm.rule import ClipNormRule


@dataclass(eq=False)
class Halve(TransformCallback):
    """A transform as others write it."""

    plugin = "halve"
    slot = "clip"
    share: float = 0.5

    def transform(self, names, parameters, grads) -> None: ...


@dataclass(eq=False)
class Third(Halve):
    """A transform that inherits the arguments of another."""

    share: float = 1 / 3
    more: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cooler(st.ClipZScore):
    """A callback of a rule, with one more argument."""

    cooling: float = 0.1


class Plain(st.ClipNorm):
    """A callback with another method."""


@dataclass
class Member(GuardMember):
    """A member with arguments of its own."""

    every: int = 3

    def on_outcome(self, outcome: Outcome) -> None: ...


OURS = [kind() for kind in (getattr(st, name) for name in st._PLUGINS) if issubclass(kind, Callback)]
OTHERS = [Halve(0.1), Third(more=(1,)), Cooler(cooling=0.2, name="mine"), Plain(3.0), Member(4), st.Guard("exact")]


@pytest.mark.parametrize("made", [*OURS, *OTHERS], ids=lambda made: type(made).__name__)
def test_hydra_passes_a_callback_on(made: Callback) -> None:
    """Bug: OmegaConf turns a callback into a DictConfig, whose methods do nothing, or fails at its fields."""
    assert not is_structured_config(made)
    assert not is_structured_config(type(made))
    passed = hydra.utils.instantiate(OmegaConf.create({"_target_": "builtins.dict"}), callbacks=[made], one=made)
    assert passed["callbacks"][0] is passed["one"] is made
    for twin in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert type(twin) is type(made)
        assert repr(twin).split(" object at ")[0] == repr(made).split(" object at ")[0]


def test_arguments_are_inherited_and_shown() -> None:
    """Bug: fields that OmegaConf does not find are not found by a subclass or by repr, either."""
    assert repr(Third(0.2, name="mine")) == "Third(name='mine', share=0.2, more=())"
    assert list(inspect.signature(Third).parameters) == ["share", "more", "name"]
    assert Third().arguments() == {"share": 1 / 3, "more": ()}
    assert list(inspect.signature(Cooler).parameters)[-2:] == ["cooling", "name"]
    assert Cooler(z_threshold=2.0).arguments()["z_threshold"] == 2.0
    assert [field.name for field in dataclasses.fields(Third())] == ["name", "share", "more"]
    assert Plain(3.0) != Plain(3.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Plain(3.0).max_norm = 4.0  # type: ignore[misc]


def test_rules_stay_values() -> None:
    """Bug: a rule loses equality, replace or its fields because its callback hides them."""
    rule = ClipNormRule(2.0)
    assert dataclasses.is_dataclass(rule)
    assert rule == ClipNormRule(2.0) == dataclasses.replace(ClipNormRule(), max_norm=2.0)
    assert dataclasses.asdict(rule) == {"name": None, "max_norm": 2.0}
