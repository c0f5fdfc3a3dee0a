from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy

from stabletrain.config.trust import TargetError, TrustError, resolve

ALLOWED: list[tuple[str, type]] = [
    ("torch.optim.AdamW", torch.optim.Optimizer),
    ("bitsandbytes.optim.AdamW8bit", torch.optim.Optimizer),
    ("torch.amp.GradScaler", torch.amp.GradScaler),
    ("torch.nn.Linear", torch.nn.Module),
    ("torchmetrics.classification.MulticlassAccuracy", torch.nn.Module),
    ("lightning.pytorch.callbacks.ModelCheckpoint", Callback),
    ("lightning.pytorch.plugins.precision.MixedPrecision", Precision),
    ("lightning.pytorch.strategies.FSDPStrategy", Strategy),
    ("lightning.pytorch.loggers.CSVLogger", Logger),
    ("lightning.pytorch.demos.boring_classes.BoringModel", LightningModule),
    ("stabletrain.workloads.CharGPT", LightningModule),
    ("stabletrain.ClipZScore", Callback),
    ("stabletrain.ClipZScore.zclip", Callback),
    ("stabletrain.SkipOutliers.olmo", Callback),
]

FOREIGN = [
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
    "stabletrain.tracking.sqlite_file.subprocess.run",
    "stabletrain.tracking.git.subprocess.run",
    "stabletrain.config.trust.importlib.import_module",
]

NOT_A_CLASS = [
    "torch.nn.modules.module.torch.load",
    "torch.load",
    "torch.save",
    "torch.serialization.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils.collect_env.run",
    "torch.jit.load",
    "torch.multiprocessing.spawn",
    "torch.distributed.run.main",
    "torch.compile",
    "torch.nn.functional.cross_entropy",
    "torch.optim.swa_utils.get_ema_avg_fn",
    "bitsandbytes.utils.execute_and_return",
    "stabletrain.runtime.checkpoints.durable.discard",
    "stabletrain.tracking.upload_unsent",
    "stabletrain.tracking.runs.keep_files",
    "stabletrain.tracking.write_environment",
    "stabletrain.tracking.ensure_store",
    "stabletrain.tracking.git_state",
    "stabletrain.config.construct.instantiate",
    "stabletrain.callbacks",
    "stabletrain.launch.process.start_process",
    # class methods, static methods, and other ways round a class
    "lightning.pytorch.LightningModule.load_from_checkpoint",
    "stabletrain.workloads.CharGPT.load_from_checkpoint",
    "lightning.pytorch.LightningDataModule.from_datasets",
    "stabletrain.ClipZScore.arguments",
    "stabletrain.errors.UserError.__init__",
    "torch.nn.Linear.__init__.__globals__",
    "torch.optim",
    "torch.float32",
]

WITH_EFFECTS = [
    ("torch.fx.GraphModule", torch.nn.Module),
    ("torch.jit.ScriptModule", torch.nn.Module),
    ("torch.distributed.nn.RemoteModule", torch.nn.Module),
    ("lightning.pytorch.cli.SaveConfigCallback", Callback),
    ("lightning.pytorch.serve.ServableModuleValidator", Callback),
    ("lightning.pytorch.loggers.WandbLogger", Logger),
    ("lightning.pytorch.loggers.CometLogger", Logger),
    ("lightning.pytorch.loggers.MLFlowLogger", Logger),
    ("lightning.pytorch.plugins.environments.MPIEnvironment", ClusterEnvironment),
    ("lightning.pytorch.demos.mnist_datamodule.MNISTDataModule", LightningDataModule),
    ("lightning.pytorch.demos.transformer.LightningTransformer", LightningModule),
    ("stabletrain.testing.toy.ToyModule", LightningModule),
    ("stabletrain.launch.interrupt.SaveAndStop", Callback),
    ("stabletrain_plugins.resume_exactly.test_resume_exactly.Save", Callback),
]


@pytest.mark.parametrize(("target", "base"), ALLOWED)
def test_allowed(target: str, base: type) -> None:
    """Bug: a class that recipes need is refused."""
    assert callable(resolve(target, [base]))


@pytest.mark.parametrize("target", FOREIGN + NOT_A_CLASS)
def test_refused_whatever_the_place(target: str) -> None:
    # with `object` every class would be of the right kind: these have to be refused before their kind is asked
    with pytest.raises((TrustError, TargetError)) as caught:
        resolve(target, [object])
    if target != "stabletrain.tracking.runs.keep_files":  # it may be elsewhere, then there is no such object
        assert "may not be built from a config" in str(caught.value)


@pytest.mark.parametrize(("target", "base"), WITH_EFFECTS)
def test_a_class_of_the_right_kind_with_an_effect_is_refused(target: str, base: type) -> None:
    """Bug: a logger that uploads the run, or a module that compiles code, chosen by a stranger's recipe."""
    with pytest.raises(TrustError, match="may not be built from a config"):
        resolve(target, [base])


def test_the_effect_of_a_class_can_be_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: users of Weights & Biases cannot use recipes; or trust in one class is trust in all."""
    module = "lightning.pytorch.loggers.wandb"
    assert resolve("lightning.pytorch.loggers.WandbLogger", [Logger], [module]).__name__ == "WandbLogger"
    with pytest.raises(TrustError, match=r"add --trust lightning\.pytorch\.loggers\.comet"):
        resolve("lightning.pytorch.loggers.CometLogger", [Logger], [module])
    monkeypatch.setenv("STABLETRAIN_TRUST", module)
    assert resolve("lightning.pytorch.loggers.WandbLogger", [Logger]).__name__ == "WandbLogger"


OTHER_KIND = [
    ("torch.PyTorchFileWriter", torch.nn.Module),
    ("torch.cuda.memory.CUDAPluggableAllocator", torch.nn.Module),
    ("torch.nn.Identity", Callback),
    ("torch.optim.SGD", LightningModule),
    ("stabletrain.ClipZScore.zclip", Logger),
]


@pytest.mark.parametrize(("target", "base"), OTHER_KIND)
def test_a_class_of_another_kind_is_refused(target: str, base: type) -> None:
    """Bug: any class of a trusted package is built anywhere."""
    with pytest.raises(TrustError, match=rf"expected a .*, got a .* from _target_ '{target}'"):
        resolve(target, [base])


def test_an_abstract_class_is_refused() -> None:
    """Bug: a TypeError of Python, in the worker."""
    with pytest.raises(TrustError, match="abstract"):
        resolve("lightning.pytorch.strategies.ParallelStrategy", [Strategy])


def test_a_class_cannot_say_itself_that_it_is_of_the_kind(install: Callable[..., Path]) -> None:
    """Bug: `issubclass` asks the base, and ABCs with a hook say yes to a class that inherits nothing."""
    code = """
class Says(type):
    def __subclasscheck__(cls, other): return True
class Base(metaclass=Says): ...
class Other: ...
"""
    install("saying_train", {"__init__.py": code})
    with pytest.raises(TrustError, match="expected a Base, got a Other"):
        resolve("saying_train.Other", [resolve("saying_train.Base", [object])])


def test_only_own_constructors_of_rules_are_presets(install: Callable[..., Path]) -> None:
    """Bug: with presets, any class method of a callback could be called."""
    code = """
from typing import Self
from lightning.pytorch import Callback
class Mine(Callback):
    @classmethod
    def load(cls, path: str) -> Self: raise SystemExit("called")
"""
    install("loading_train", {"__init__.py": code})
    with pytest.raises(TrustError, match="expected a class, got a function"):
        resolve("loading_train.Mine.load", [Callback])


@pytest.mark.parametrize("target", [None, 3, "", "a b", "torch..load", "torch.nn.", ["torch"], {"x": 1}])
def test_what_is_no_name_is_refused(target: object) -> None:
    """Bug: a traceback for a value that is no dotted name."""
    with pytest.raises(TargetError, match="dotted name"):
        resolve(target, [object])


def test_an_untrusted_package_is_not_even_imported(install: Callable[..., Path]) -> None:
    # importing is running: the check has to come first
    install("evil_pkg", {"__init__.py": "raise SystemExit('imported')"}, distribution="evil-dist")
    site = install("innocent", {})
    (site / "evil_unowned.py").write_text("raise SystemExit('imported')")
    with pytest.raises(TrustError, match="'evil_unowned' is not trusted"):
        resolve("evil_unowned.Thing", [object])


def test_an_owner_of_an_entry_point_is_trusted(install: Callable[..., Path]) -> None:
    """Bug: plugins of third parties are refused; or everything that their modules import is trusted too."""
    install("cool_train", {"__init__.py": "class Cool: ...\nfrom os import system\nimport os\n"})
    assert resolve("cool_train.Cool", [object]).__name__ == "Cool"
    for smuggled in ("cool_train.system", "cool_train.os.system"):
        with pytest.raises(TrustError):
            resolve(smuggled, [object])


def test_trust_comes_from_argument_or_environment(
    install: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: one of the two has no effect, or spaces in the list."""
    site = install("innocent", {})
    (site / "my_models.py").write_text("class Model: ...\n")
    with pytest.raises(TrustError, match="add --trust my_models"):
        resolve("my_models.Model", [object])
    assert resolve("my_models.Model", [object], ["my_models"]).__name__ == "Model"
    monkeypatch.setenv("STABLETRAIN_TRUST", "other, my_models")
    assert resolve("my_models.Model", [object]).__name__ == "Model"


def test_a_prefix_is_a_package_and_not_a_spelling(install: Callable[..., Path]) -> None:
    """Bug: a package whose name begins as a trusted one is trusted."""
    site = install("innocent", {})
    (site / "torchevil.py").write_text("class Model: ...\n")
    with pytest.raises(TrustError):
        resolve("torchevil.Model", [object])


def test_a_near_name_is_offered() -> None:
    """Bug: a misspelt class without a suggestion."""
    with pytest.raises(TargetError, match=r"did you mean 'torch.optim.AdamW'"):
        resolve("torch.optim.AdmaW", [object])


def test_a_module_whose_names_cannot_be_asked_for_is_a_wrong_name() -> None:
    """Bug: a traceback, since ``torch.classes`` raises a RuntimeError for a name that it does not know."""
    with pytest.raises(TargetError, match=r"'torch\.classes\.a' has no 'b'"):
        resolve("torch.classes.a.b", [Callback])


def test_a_module_that_cannot_be_imported_is_a_wrong_name(install: Callable[..., Path]) -> None:
    """Bug: a traceback for an ImportError that is not about a missing module."""
    install("half", {"broken.py": "from os import nothing_of_this_name"})
    with pytest.raises(TargetError, match=r"importing 'half\.broken' failed: cannot import name"):
        resolve("half.broken.Thing", [Callback], ["half"])
