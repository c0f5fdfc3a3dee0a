"""Import large packages: torch, Lightning and MLflow make more than a million objects that stay until the end.

Python's garbage collector looks through them again and again while they are imported, once more in each full collection
of the training, and when the process ends, and finds next to nothing. With it, these imports take 5.3 s, a full
collection 0.6 s and the end of the process 1.8 s; without it 4.1 s, next to nothing and 0.3 s (decision 0054).
"""

from __future__ import annotations

import gc
import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing(module: str) -> Iterator[None]:
    """Within it nothing is collected, and what exists at its end is left out of all later collections.

    Use it in processes of ours only, and before there are objects of the user's: those are collected as always, also
    at the end of the process, which for instance closes their files.

    Args:
        module: that is imported within it. If it is imported already, nothing is different; if it cannot be imported,
            nothing is left out, or each further attempt would keep more.
    """
    if module in sys.modules:
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if module in sys.modules:
            gc.freeze()  # also what would be garbage now: some 13,000 objects, and it takes 0.6 s to find them
        if was_enabled:
            gc.enable()


def collect_before_exit() -> None:
    """Collect what is left of a run, before its process ends.

    If a part of the run is still alive then, or a file that is open for writing, something that was imported may hold
    it: each ``Optional[Class]`` is in a cache of ``typing``, which holds the class, and so the module with all its
    variables. Python then looks through all objects at its end, as it would without `importing`, and destroys more of
    them.
    """
    gc.collect()
    kept: tuple[type, ...] = (io.BufferedWriter, io.BufferedRandom)
    lightning = sys.modules.get("lightning.pytorch")
    if lightning is not None:
        kept += (lightning.Callback, lightning.LightningDataModule, lightning.LightningModule, lightning.Trainer)
    streams = [getattr(handler, "stream", None) for handler in logging.getLogger().handlers]
    logs = {id(getattr(stream, "buffer", None)) for stream in streams}  # which logging itself closes
    if any(issubclass(type(each), kept) and id(each) not in logs for each in gc.get_objects()):
        gc.unfreeze()
