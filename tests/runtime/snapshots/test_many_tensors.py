"""A snapshot of thousands of small tensors does not wait for Python's garbage collection, and leaves it as it was."""

import gc
from typing import Any

import pytest
import torch
from fits import HEALTHY, Net, batches, fit
from lightning.pytorch import Callback

from stabletrain import SkipNonFinite
from stabletrain.runtime.snapshots.snapshot import Snapshot
from stabletrain.runtime.snapshots.state_tree import SnapshotError


class Capture(Callback):
    """Takes and restores a snapshot of a run with many tensors, and counts collections meanwhile."""

    def __init__(self, skip: SkipNonFinite) -> None:
        self.skip, self.collections = skip, 0

    def count(self, phase: str, info: dict[str, Any]) -> None:
        self.collections += phase == "start"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        guard: Any = self.skip._guard
        state = trainer.optimizers[0].state
        state["many"] = [{"exp_avg": torch.zeros(1), "step": i} for i in range(2000)]
        snapshot = Snapshot()
        gc.callbacks.append(self.count)
        try:
            snapshot.capture(guard, None)
            snapshot.restore(guard, None, "test")
        finally:
            gc.callbacks.remove(self.count)
        del state["many"]


@pytest.mark.parametrize("enabled", [True, False])
def test_no_collection_meanwhile(enabled: bool) -> None:
    """Bugs: a step that waits for five collections of everything alive; collection off for good, or on where the user
    has switched it off."""
    skip = SkipNonFinite()
    capture = Capture(skip)
    (gc.enable if enabled else gc.disable)()
    try:
        fit(Net(), batches(HEALTHY), skip, capture)
        assert gc.isenabled() is enabled
        with pytest.raises(SnapshotError):
            Snapshot().restore(skip._guard, None, "test")  # type: ignore[arg-type]
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
    assert capture.collections <= 2, "one after each, at most"
