from collections.abc import Callable
from pathlib import Path

import pytest

from stabletrain.config.construct import instantiate
from stabletrain.config.trust import TargetError, TrustError, resolve

ALLOWED = [
    "torch.optim.AdamW",
    "torch.optim.SGD",
    "torch.amp.GradScaler",
    "torch.nn.Linear",
    "torch.device",
    "torch.nn.functional.cross_entropy",
    "torchmetrics.Accuracy",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.plugins.precision.MixedPrecision",
    "lightning.pytorch.strategies.FSDPStrategy",
    "stabletrain.workloads.CharGPT",
]

REFUSED = [
    "os.system",
    "pip.main",
    "builtins.eval",
    "subprocess.run",
    "hydra.utils.get_method",
    # the same things by the names that trusted modules happen to give them
    "torch.os.system",
    "torch.sys.exit",
    "lightning.pytorch.os.system",
    "torch.optim.optimizer.functools.partial",
    "stabletrain.tracking.store.subprocess.run",
    "stabletrain.config.trust.importlib.import_module",
    "torch.nn.modules.module.torch.load",
    # what trusted packages offer to run other code
    "torch.load",
    "torch.serialization.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils.collect_env.run",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.multiprocessing.spawn",
    "torch.distributed.run.main",
    "torch.compile",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.pytorch.LightningModule.load_from_checkpoint",
    "stabletrain.config.trust.instantiate",
    "stabletrain.callbacks",
    "stabletrain.launch.process.start_process",
    # ways round a class
    "stabletrain.errors.UserError.__init__",
    "torch.nn.Linear.__init__.__globals__",
    "torch.optim",
    "torch.float32",
]


@pytest.mark.parametrize("target", ALLOWED)
def test_allowed(target: str) -> None:
    """Bug: a class that recipes need is refused."""
    assert callable(resolve(target))


@pytest.mark.parametrize("target", REFUSED)
def test_refused(target: str) -> None:
    # a config from a download would run it
    with pytest.raises(TrustError, match="may not be built from a config"):
        resolve(target)


@pytest.mark.parametrize("target", [None, 3, "", "a b", "torch..load", "torch.nn.", ["torch"], {"x": 1}])
def test_what_is_no_name_is_refused(target: object) -> None:
    """Bug: a traceback for a value that is no dotted name."""
    with pytest.raises(TargetError, match="dotted name"):
        resolve(target)


def test_an_untrusted_package_is_not_even_imported(install: Callable[..., Path]) -> None:
    # importing is running: the check has to come first
    install("evil_pkg", {"__init__.py": "raise SystemExit('imported')"}, distribution="evil-dist")
    site = install("innocent", {})
    (site / "evil_unowned.py").write_text("raise SystemExit('imported')")
    with pytest.raises(TrustError, match="'evil_unowned' is not trusted"):
        resolve("evil_unowned.Thing")


def test_an_owner_of_an_entry_point_is_trusted(install: Callable[..., Path]) -> None:
    """Bug: plugins of third parties are refused; or everything that their modules import is trusted too."""
    install("cool_train", {"__init__.py": "class Cool: ...\nfrom os import system\nimport os\n"})
    assert resolve("cool_train.Cool").__name__ == "Cool"
    for smuggled in ("cool_train.system", "cool_train.os.system"):
        with pytest.raises(TrustError):
            resolve(smuggled)


def test_trust_comes_from_argument_or_environment(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: one of the two has no effect, or spaces in the list."""
    site = install("innocent", {})
    (site / "my_models.py").write_text("class Model: ...\n")
    with pytest.raises(TrustError, match="add --trust my_models"):
        resolve("my_models.Model")
    assert resolve("my_models.Model", ["my_models"]).__name__ == "Model"
    monkeypatch.setenv("STABLETRAIN_TRUST", "other, my_models")
    assert resolve("my_models.Model").__name__ == "Model"


def test_a_prefix_is_a_package_and_not_a_spelling(install: Callable[..., Path]) -> None:
    """Bug: a package whose name begins as a trusted one is trusted."""
    site = install("innocent", {})
    (site / "torchevil.py").write_text("class Model: ...\n")
    with pytest.raises(TrustError):
        resolve("torchevil.Model")


def test_a_near_name_is_offered() -> None:
    """Bug: a misspelt class without a suggestion."""
    with pytest.raises(TargetError, match=r"did you mean 'torch.optim.AdamW'"):
        resolve("torch.optim.AdmaW")


def test_nested_targets_are_checked_before_anything_is_built() -> None:
    # Hydra builds from the inside out, so a check of the outer target alone comes too late
    node = {
        "_target_": "torch.nn.Sequential",
        "_args_": [
            {"_target_": "torch.nn.Linear", "in_features": {"a": [{"_target_": "os.system", "command": "false"}]}}
        ],
    }
    assert [key for key, _ in check_targets(node, key="model")] == ["model._args_[0].in_features.a[0]._target_"]
    with pytest.raises(TrustError, match=r"model\._args_\[0\]\.in_features\.a\[0\]\._target_: 'os\.system'"):
        instantiate(node, key="model")


def test_what_a_constructor_raises_arrives_unwrapped() -> None:
    # Hydra's InstantiationException hides the class that the worker decides by
    with pytest.raises(ValueError, match="Invalid learning rate"):
        instantiate({"_target_": "torch.optim.SGD", "params": [{"_target_": "torch.nn.Parameter"}], "lr": -1.0})


def test_containers_arrive_as_plain_python() -> None:
    # a ListConfig in a callback breaks its checkpoint
    made = instantiate({"_target_": "torch.optim.AdamW", "_partial_": True, "betas": [0.9, 0.95]})
    assert type(made.keywords["betas"]) is list
