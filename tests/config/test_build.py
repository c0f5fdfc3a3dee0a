from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from omegaconf import OmegaConf

import stabletrain
from stabletrain.config.compose import compose
from stabletrain.config.trust import TrustError
from stabletrain.errors import UserError


def test_omegaconf_and_plain_nodes_mean_the_same() -> None:
    """Bug: interpolations are not resolved, or empty slots are not skipped."""
    node = {"clip": {"_target_": "stabletrain.ClipNorm", "max_norm": "${limit}"}, "spike": None, "nonfinite": {}}
    config = OmegaConf.create({"plugins": node, "limit": 0.5})
    (made,) = stabletrain.callbacks(config.plugins)
    assert isinstance(made, stabletrain.ClipNorm)
    assert made.max_norm == 0.5


def test_a_config_is_resolved_once() -> None:
    # the app's own interpolations are the app's; what is text after them stays text, and is refused
    node = {"clip": {"_target_": "stabletrain.ClipNorm", "name": "${text}"}}
    escaped = OmegaConf.create({"plugins": node, "text": "\\${oc.create:{_target_:psutil.Popen,args:[touch,PWNED]}}"})
    for given in (escaped.plugins, node):
        with pytest.raises(TrustError, match=r"plugins\.clip\.name: expected a resolved value"):
            stabletrain.callbacks(given)


def test_nothing_is_built_before_all_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the callbacks before the one that is refused have been built."""
    built: list[object] = []
    monkeypatch.setattr(EarlyStopping, "__init__", lambda self, **_: built.append(self))
    early = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "loss"}
    with pytest.raises(TrustError, match=r"plugins\.b: expected a Lightning callback"):
        stabletrain.callbacks({"a": early, "b": {"_target_": "torch.nn.Identity"}})
    assert not built


@pytest.mark.parametrize(
    "target",
    [
        "bitsandbytes.utils.execute_and_return",
        "stabletrain.runtime.checkpoints.durable.discard",
        "stabletrain.tracking.write_environment",
        "torch.PyTorchFileWriter",
        "torch.cuda.memory.CUDAPluggableAllocator",
        "lightning.pytorch.Trainer",
    ],
)
def test_what_is_no_callback_is_not_called(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: it is called, and only then found to be no callback; or it is called as the value of an argument."""
    monkeypatch.chdir(tmp_path)
    for node in ({"_target_": target}, {"_target_": "stabletrain.ClipNorm", "name": {"_target_": target}}):
        with pytest.raises(TrustError, match=r"plugins\.x"):
            stabletrain.callbacks({"x": {**node, "_args_": ["PWNED"]} if "name" not in node else node})
    assert not list(tmp_path.iterdir())


def test_a_callback_of_the_other_package_is_named() -> None:
    """Bug: "expected a Lightning callback, got a Timer", which is one, of pytorch_lightning."""
    node = {"x": {"_target_": "pytorch_lightning.callbacks.Timer"}}
    with pytest.raises(TrustError, match=r"got a Timer .* whose Callback is that of pytorch_lightning; a config"):
        stabletrain.callbacks(node, trust=["pytorch_lightning"])


def test_what_is_no_callback_is_refused() -> None:
    """Bug: any class can be built in a slot."""
    with pytest.raises(UserError, match=r"plugins\.clip: expected a Lightning callback, got a Identity"):
        stabletrain.callbacks({"clip": {"_target_": "torch.nn.Identity"}})


def test_arguments_without_a_choice_are_refused() -> None:
    # they would be dropped, and the run would go unprotected
    with pytest.raises(UserError, match=r"plugins\.spike: expected _target_.*plugins/spike=OPTION"):
        stabletrain.callbacks({"spike": {"window": 3}})
    with pytest.raises(UserError, match=r"pass cfg\.plugins"):
        stabletrain.callbacks([1])


def test_any_lightning_callback_can_be_in_a_slot() -> None:
    """Bug: callbacks that are not plugins are refused."""
    (made,) = stabletrain.callbacks({"x": {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "loss"}})
    assert isinstance(made, EarlyStopping)


def test_default_callbacks_are_the_stack_of_train_yaml() -> None:
    # a script with default_callbacks() and a run of a recipe have to be protected alike
    tiny = str(Path(__file__).parents[1] / "launch" / "tiny.yaml")
    off = ("schedule", "plugins/clip", "plugins/nonfinite", "plugins/outliers", "plugins/spike", "plugins/gradients")
    import yaml

    from stabletrain.paths import data_dir

    defaults = yaml.safe_load((data_dir("conf") / "train.yaml").read_text())["defaults"]
    chosen = {group: name for entry in defaults if isinstance(entry, dict) for group, name in entry.items()}
    config = compose(tiny, [f"{group}={chosen[group]}" for group in off]).config
    assert config["schedule"] is None
    composed = stabletrain.callbacks(config["plugins"])
    made = stabletrain.default_callbacks()
    assert [type(callback) for callback in made] == [type(callback) for callback in composed]
    for one, other in zip(made, composed, strict=True):
        assert _arguments(one) == _arguments(other)


def test_default_callbacks_with_other_choices() -> None:
    # catches a choice that is taken and means nothing
    names = [type(each).__name__ for each in stabletrain.default_callbacks(spike="none", clip="norm", resume="exactly")]
    assert "Rollback" not in names
    assert "ClipZScore" not in names
    assert {"ClipNorm", "ResumeExactly", "SkipOutliers"} <= set(names)
    with pytest.raises(UserError, match=r"there is no slot 'spkie'; did you mean 'spike'"):
        stabletrain.default_callbacks(spkie="none")
    with pytest.raises(UserError, match=r"clip has no option 'nrom'; did you mean 'norm'"):
        stabletrain.default_callbacks(clip="nrom")


def _arguments(callback: Callback) -> dict[str, object]:
    import inspect

    names = inspect.signature(type(callback)).parameters
    return {name: getattr(callback, name, None) for name in names}


@pytest.mark.parametrize("spill", ["/tmp/elsewhere", "../x", "~/x"])
def test_a_node_writes_below_the_current_folder_unless_it_is_trusted(spill: str) -> None:
    """Bug: a config from anywhere writes anywhere in somebody else's Hydra app."""
    node = {"spike": {"_target_": "stabletrain.Rollback", "spill": spill}}
    with pytest.raises(UserError, match=r"plugins\.spike\.spill: expected a path below the current .*outside=True"):
        stabletrain.callbacks(node)
    (made,) = stabletrain.callbacks(node, paths_outside=True)
    assert made.spill == spill
    assert stabletrain.callbacks({"spike": {"_target_": "stabletrain.Rollback", "spill": "snapshots"}})
