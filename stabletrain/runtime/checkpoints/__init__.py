"""The crash-consistent store of checkpoints: the plugin `SaveCheckpoints` writes them, `load` reads one.

Every name is loaded on first use, so that `newest_file` can be imported without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stabletrain.lazy import lazy_exports

if TYPE_CHECKING:
    from stabletrain.runtime.checkpoints.errors import CheckpointError
    from stabletrain.runtime.checkpoints.loading import load, newest, verify
    from stabletrain.runtime.checkpoints.manifest import CheckpointInfo, Manifest
    from stabletrain.runtime.checkpoints.saver import Saver
    from stabletrain.runtime.checkpoints.store import Retention, Store

__all__ = ["CheckpointError", "CheckpointInfo", "Manifest", "Retention", "Saver", "Store", "load", "newest", "verify"]

_MODULES = {
    "CheckpointError": "errors",
    "CheckpointInfo": "manifest",
    "Manifest": "manifest",
    "Retention": "store",
    "Saver": "saver",
    "Store": "store",
    "load": "loading",
    "newest": "loading",
    "verify": "loading",
}

__getattr__ = lazy_exports(__name__, _MODULES)
