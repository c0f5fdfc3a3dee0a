"""Import large packages: torch, Lightning and MLflow make more than a million objects that stay until the end.

Python's garbage collector looks through them again and again while they are imported, once more in each full collection
of the training, and when the process ends, and finds next to nothing. With it, these imports take 5.3 s, a full
collection 0.6 s and the end of the process 1.8 s; without it 4.1 s, next to nothing and 0.3 s (decision 0054).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Within it nothing is collected, and what exists at its end is left out of all later collections.

    Use it in processes of ours only, and before there are objects of the user's: those are collected as always, also
    at the end of the process, which for instance closes their files.

    Args:
        module: that is imported within it. If it is imported already, nothing is different.
    """
    if module in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # also what would be garbage now: some 13,000 objects, and it takes 0.6 s to find them
        if was_enabled:
            gc.enable()


def collect_before_exit() -> None:
    """Collect what is left of a run, before its process ends.

    If a part of the run is still alive then, something that was imported holds it. Python then looks through all
    objects at its end, as it would without `importing`, and destroys more of them.
    """
    gc.collect()
    lightning = sys.modules.get("lightning.pytorch")
    if lightning is not None:
        parts = (lightning.Callback, lightning.LightningDataModule, lightning.LightningModule, lightning.Trainer)
        if any(issubclass(type(each), parts) for each in gc.get_objects()):
            gc.unfreeze()
