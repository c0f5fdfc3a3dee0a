"""Checkpoints on disk that are complete or absent: written by `Saver`, verified by `load` while they are read.

Importing this package is cheap: every name is loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stabletrain.runtime.checkpoints.loading import load, newest, verify
    from stabletrain.runtime.checkpoints.manifest import CheckpointError, CheckpointInfo, Manifest
    from stabletrain.runtime.checkpoints.saver import Saver
    from stabletrain.runtime.checkpoints.store import Retention, Store

__all__ = ["CheckpointError", "CheckpointInfo", "Manifest", "Retention", "Saver", "Store", "load", "newest", "verify"]

_MODULES = {
    "CheckpointError": "manifest",
    "CheckpointInfo": "manifest",
    "Manifest": "manifest",
    "Retention": "store",
    "Saver": "saver",
    "Store": "store",
    "load": "loading",
    "newest": "loading",
    "verify": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
