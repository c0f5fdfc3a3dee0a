import inspect
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from stabletrain.errors import UserError
from stabletrain.testing.trainer import quiet_trainer
from stabletrain.workloads import CharGPT, DigitsCNN, DigitsData, ShakespeareData

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("option", ["model/char_gpt", "model/digits_cnn", "data/shakespeare", "data/digits"])
def test_config_holds_every_argument_with_its_default(option: str) -> None:
    """Catches a default that differs between the command line and a script, and an argument without a key."""
    node = yaml.safe_load((CONF / f"{option}.yaml").read_text())
    package, _, name = node.pop("_target_").rpartition(".")
    signature = inspect.signature(getattr(import_module(package), name))
    assert node == {key: parameter.default for key, parameter in signature.parameters.items()}
    assert {key: type(value) for key, value in node.items()} == {
        key: type(parameter.default) for key, parameter in signature.parameters.items()
    }


@pytest.mark.parametrize(("model", "data"), [(CharGPT, DigitsData), (DigitsCNN, ShakespeareData)])
def test_the_data_of_another_workload_are_refused(
    model: type[LightningModule], data: type[LightningDataModule]
) -> None:
    """Bug: ``model=digits_cnn`` with the data of a language model ends in a traceback about shapes."""
    with pytest.raises(UserError, match=f"data: {model.__name__} trains on data=.*, got {data.__name__}; use data="):
        quiet_trainer(max_steps=1).fit(model(), datamodule=data())
