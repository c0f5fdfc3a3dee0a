"""Lightning's two packages."""

import subprocess
import sys

import pytest
import pytorch_lightning
from lightning.fabric.plugins.io import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from pytorch_lightning.callbacks import ModelCheckpoint

from stabletrain import SaveCheckpoints, SkipNonFinite
from stabletrain.runtime.internals import packages
from stabletrain.runtime.internals.packages import both, own
from stabletrain.tracking import MLflowLogger


def test_a_class_is_found_under_both_names() -> None:
    """Bugs: a check that is False for the other package, of pytorch or of fabric; a class of no package accepted."""
    assert both(Callback) == (Callback, pytorch_lightning.Callback)
    assert isinstance(ModelCheckpoint(), both(Checkpoint))
    assert [each.__module__.partition(".")[0] for each in both(MisconfigurationException)] == [
        "lightning",
        "lightning_fabric",
    ]
    theirs = pytorch_lightning.strategies
    assert own(Strategy, theirs.DDPStrategy()) is theirs.Strategy  # type: ignore[type-abstract,arg-type]
    assert own(Strategy, DDPStrategy()) is Strategy  # type: ignore[type-abstract]
    with pytest.raises(
        ValueError, match=r"both: expected a class of lightning\.pytorch or lightning\.fabric, got one of"
    ):
        both(int)


def test_ours_are_callbacks_loggers_and_the_like_of_both_packages() -> None:
    """Bugs: a callback that a Trainer takes for a list, or not for one that saves; a method of the wrong package."""
    for kind, base in ((packages.Checkpoint, Checkpoint), (packages.CheckpointIO, CheckpointIO)):
        assert issubclass(kind, both(base)[0])
        assert issubclass(kind, both(base)[1])
    assert all(isinstance(MLflowLogger("sqlite://"), each) for each in both(Logger))  # type: ignore[type-abstract]
    off = {"logger": False, "accelerator": "cpu"}
    save = SaveCheckpoints()
    for made in (pytorch_lightning.Trainer, both(packages.lightning_pytorch.Trainer)[0]):
        assert made(callbacks=save, **off).checkpoint_callbacks == [save]
        skip = SkipNonFinite()
        assert skip in made(callbacks=skip, **off).callbacks  # type: ignore[arg-type, operator]


def test_a_broken_other_package_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an old pytorch_lightning, which the script does not use, makes our import fail."""
    monkeypatch.setitem(sys.modules, "pytorch_lightning", None)
    assert packages._import_other() is False


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_messages_stay_with_the_package_that_the_script_imports(name: str) -> None:
    """Bug: Lightning's messages, which the script has silenced by the name of their logger, come back."""
    script = f"import {name}, stabletrain.runtime.ranks\nfrom lightning_utilities.core import rank_zero\n"
    command = [sys.executable, "-W", "error", "-c", f"{script}print(rank_zero.log.name)"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == f"{name}.utilities.rank_zero", done.stderr
