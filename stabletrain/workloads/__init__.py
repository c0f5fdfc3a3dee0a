"""The small LightningModules and LightningDataModules that the recipes train. Loaded on first use."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stabletrain.workloads.char_gpt import CharGPT
    from stabletrain.workloads.digits_cnn import DigitsCNN
    from stabletrain.workloads.digits_data import DigitsData
    from stabletrain.workloads.errors import DataError
    from stabletrain.workloads.shakespeare_data import ShakespeareData

__all__ = ["CharGPT", "DataError", "DigitsCNN", "DigitsData", "ShakespeareData"]

_MODULES = {
    "CharGPT": "char_gpt",
    "DataError": "errors",
    "DigitsCNN": "digits_cnn",
    "DigitsData": "digits_data",
    "ShakespeareData": "shakespeare_data",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
