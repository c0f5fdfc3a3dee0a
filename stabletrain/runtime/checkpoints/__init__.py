"""The crash-consistent store of checkpoints: `load` reads one, the plugin `save_checkpoints` writes them."""

from stabletrain.runtime.checkpoints.loading import load, newest, verify
from stabletrain.runtime.checkpoints.manifest import About, CheckpointError, Manifest
from stabletrain.runtime.checkpoints.saver import Saver
from stabletrain.runtime.checkpoints.store import Keep, Store

__all__ = ["About", "CheckpointError", "Keep", "Manifest", "Saver", "Store", "load", "newest", "verify"]
