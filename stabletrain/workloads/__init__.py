"""The small LightningModules and LightningDataModules that the recipes train. Loaded on first use."""

from typing import TYPE_CHECKING

from stabletrain.lazy import lazy_exports

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

__getattr__ = lazy_exports(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
