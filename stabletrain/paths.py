"""Paths of the data folders conf/ and recipes/."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Return the absolute path of a data folder: beside the package in a checkout, inside it in an installed wheel.

    Args:
        name: ``"conf"`` or ``"recipes"``.

    >>> (data_dir("conf") / "train.yaml").is_file()
    True
    """
    checkout = _PACKAGE.parent
    # the checkout first: an editable install may leave outdated copies inside the package
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return _PACKAGE / name
