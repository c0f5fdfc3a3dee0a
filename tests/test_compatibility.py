"""What docs/compatibility.md says of each feature is what happens, under both package names of Lightning."""

import re

import compatibility
import pytest
from features import FEATURES, Feature
from foreign_modules import FOREIGN

FAULTS = ("DIFFERENT", "ERROR", "NOT FINITE", "SKIPPED")
QUICK = (
    "ReduceLROnPlateau by steps, on the training loss",
    "hidden state in an attribute (LSTM)",
    "list of two loaders",
    "BackboneFinetuning",
)


def check(feature: Feature, package: str) -> None:
    cells = compatibility.row(feature, package)
    assert not [cell for cell in cells if any(fault in cell for fault in FAULTS)]
    page = compatibility.PAGE.read_text(encoding="utf-8")
    line = compatibility.line(feature, cells)
    assert line in page, f"{line}; if this is right: python tests/helpers/compatibility.py --write"


@pytest.mark.parametrize("feature", [each for each in FEATURES if each.name in QUICK], ids=lambda each: each.name)
def test_some_features(feature: Feature) -> None:
    """Bug: as below, in the features on which most depends."""
    check(feature, "lightning.pytorch")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_all_features(package: str) -> None:
    """Bug: with the plugins a healthy run takes another course, a NaN reaches the weights, or a resume loses something,
    in a training that uses a feature which the other tests do not."""
    for feature in FEATURES:
        check(feature, package)


def test_the_page_names_every_feature() -> None:
    """Bug: a feature was removed from the table and is still promised on the page."""
    rows = [row for row in compatibility.PAGE.read_text(encoding="utf-8").splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[1:]] == [each.name for each in FEATURES]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("feature", "package"),
    [pytest.param(each, package, id=f"{each.name}-{package}") for each in FOREIGN for package in each.packages],
)
def test_modules_of_other_projects(feature: Feature, package: str) -> None:
    """Bug: as above, in a module that nobody here wrote."""
    try:
        cells = compatibility.row(feature, package)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed")
    first, *others = cells
    assert others == ["skipped", "exact"]
    assert re.fullmatch("identical(, and says: hidden state: .*)?", first)
