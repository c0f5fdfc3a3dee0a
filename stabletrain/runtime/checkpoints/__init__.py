"""The crash-consistent store of checkpoints: `load` reads one, the plugin `save_checkpoints` writes them."""

from stabletrain.runtime.checkpoints.loading import load, newest, verify
from stabletrain.runtime.checkpoints.manifest import CheckpointError, CheckpointInfo, Manifest
from stabletrain.runtime.checkpoints.saver import Saver
from stabletrain.runtime.checkpoints.store import Retention, Store

__all__ = ["CheckpointError", "CheckpointInfo", "Manifest", "Retention", "Saver", "Store", "load", "newest", "verify"]
