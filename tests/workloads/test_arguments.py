"""Values with which a module or data module would fail during a run, or train nothing."""

import math
from typing import Any

import pytest

from stabletrain.errors import UserError
from stabletrain.workloads import CharGPT, DigitsCNN, DigitsData, ShakespeareData

WHOLE = [
    *[(CharGPT, "model", name) for name in ("layers", "heads", "width", "context", "vocab_size", "sample_length")],
    *[(DigitsCNN, "model", name) for name in ("width", "max_shift")],
    *[(DigitsData, "data", name) for name in ("batch_size", "workers")],
    *[(ShakespeareData, "data", name) for name in ("context", "batch_size", "validation_windows", "workers")],
]
NUMBERS = [
    *[(CharGPT, name) for name in ("dropout", "label_smoothing", "z_loss", "lr", "weight_decay", "sample_temperature")],
    *[(DigitsCNN, name) for name in ("dropout", "lr", "momentum", "weight_decay")],
]


@pytest.mark.parametrize("value", [-3, True, 1.5, math.nan, math.inf, 10**30, "1"])
@pytest.mark.parametrize(("make", "node", "name"), WHOLE)
def test_a_whole_number_out_of_range(make: Any, node: str, name: str, value: object) -> None:
    """Bugs: -3 heads of a width of -3; no worker processes, but -1; NaN, which every comparison lets pass."""
    with pytest.raises(UserError, match=rf"^{node}\.{name}: expected a whole number from"):
        make(**{name: value})


@pytest.mark.parametrize("value", [-1.0, True, math.nan, math.inf, -math.inf, "1"])
@pytest.mark.parametrize(("make", "name"), NUMBERS)
def test_a_number_out_of_range(make: Any, name: str, value: object) -> None:
    """Bug: a dropout of NaN, with which every loss is NaN."""
    with pytest.raises(UserError, match=rf"^model\.{name}: expected a number"):
        make(**{name: value})


@pytest.mark.parametrize(("make", "name"), [(CharGPT, "lr"), (DigitsCNN, "lr"), (DigitsCNN, "momentum")])
def test_zero_where_it_means_nothing(make: Any, name: str) -> None:
    """Bug: a learning rate of 0 trains nothing; Nesterov momentum of 0 is an error of torch's."""
    with pytest.raises(UserError, match=rf"^model\.{name}: expected a number above 0"):
        make(**{name: 0})


def test_a_model_that_no_machine_holds() -> None:
    """Bug: memory is exhausted while the model is made."""
    with pytest.raises(UserError, match=r"at most 1e\+10 parameters.*model\.width=65536"):
        CharGPT(width=65_536, layers=1000)


def test_text_arguments_of_data() -> None:
    """Bug: an empty path is the current folder; a digest in capitals never matches."""
    with pytest.raises(UserError, match=r"data\.path"):
        ShakespeareData(path="")
    with pytest.raises(UserError, match=r"data\.sha256"):
        ShakespeareData(sha256="ABC")
