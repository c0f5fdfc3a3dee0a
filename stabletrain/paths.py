"""Where the data folders conf/ and recipes/ are: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_dir(name: str) -> Path:
    """Return the absolute path of one of the project's data folders.

    Args:
        name: ``"conf"`` or ``"recipes"``.

    >>> (data_dir("conf") / "train.yaml").is_file()
    True
    """
    checkout = _PACKAGE.parent
    # An editable install may leave stale copies inside the package, so the checkout comes first.
    if (checkout / "pyproject.toml").is_file() and (checkout / name).is_dir():
        return checkout / name
    return _PACKAGE / name
