"""A Trainer for tests: on the CPU, without output and without files that were not requested."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

from stabletrain.runtime.internals.packages import both

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""The names of Lightning's two packages."""

_package: ContextVar[str] = ContextVar("package", default=PACKAGES[0])


@contextmanager
def trained_with(package: str) -> Iterator[None]:
    """Let `quiet_trainer` and `stabletrain.testing.toy.fit` use the Trainer of this package.

    Args:
        package: one of `PACKAGES`.

    >>> with trained_with("pytorch_lightning"):
    ...     type(quiet_trainer()).__module__
    'pytorch_lightning.trainer.trainer'
    """
    token = _package.set(package)
    try:
        yield
    finally:
        _package.reset(token)


def lightning_package() -> Any:
    """The package of Lightning whose Trainer is used, ``lightning.pytorch`` outside of `trained_with`."""
    return importlib.import_module(_package.get())


def quiet_trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Make a Trainer for one process on the CPU without loggers, bars, summaries, sanity checks and checkpoints.

    Args:
        callbacks: its callbacks; checkpoints are enabled if one of them is a ``Checkpoint`` callback.
        options: arguments of the Trainer; they override the defaults above.

    >>> quiet_trainer(max_steps=5).max_steps
    5
    """
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(each, both(Checkpoint)) for each in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    made: Trainer = lightning_package().Trainer(callbacks=list(callbacks), **{**defaults, **options})
    return made
