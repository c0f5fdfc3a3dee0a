"""Packages that only a part of stabletrain needs, and the pip line for each: the callbacks need none of them."""

from __future__ import annotations

import importlib.util

from stabletrain.errors import UserError

_EXTRAS = {
    "hydra": "hydra",
    "omegaconf": "hydra",
    "pydantic": "hydra",
    "typer": "hydra",
    "click": "hydra",
    "rich": "hydra",
    "mlflow": "mlflow",
    "filelock": "mlflow",
    "bitsandbytes": "bitsandbytes",
    "pytorch_optimizer": "optim",
    "schedulefree": "schedulefree",
    "optimi": "kahan",
    "torchao": "torchao",
    "matplotlib": "plots",
    "scipy": "landscape",
    "optuna": "sweep",
    "colorlog": "sweep",
    "sklearn": "all",
}
"""Package as it is imported -> the extra that installs it."""


def pip_line(package: str | None) -> str | None:
    """Return the command that installs a package that cannot be imported; None if no extra has it.

    Args:
        package: its name or that of one of its modules, as in `ModuleNotFoundError.name`.

    >>> pip_line("mlflow.entities")
    'pip install "stabletrain[mlflow]"'
    """
    extra = _EXTRAS.get((package or "").partition(".")[0])
    return extra and f'pip install "stabletrain[{extra}]"'


def require(package: str, use: str) -> None:
    """Check that a package of an extra is installed, without importing it.

    Args:
        package: its name.
        use: what needs it, for the message.

    Raises:
        UserError: if it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{use} needs the package {package}, which is not installed: {pip_line(package)}")
