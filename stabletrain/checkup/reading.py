"""The first batches of a loader, read once; the loader is as before afterwards."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, field
from typing import Any

from stabletrain.checkup import loader_state
from stabletrain.checkup.batches import size
from stabletrain.errors import UserError
from stabletrain.runtime.data.position import size_of
from stabletrain.runtime.internals import loader as loader_internals

MOST, MOST_BYTES = 400, 1 << 29
"""Batches that are read at most, and their bytes."""


@dataclass(kw_only=True)
class Batches:
    """What was read of a loader.

    Args:
        read: the batches.
        is_whole: whether these are all of an epoch.
        length: batches of an epoch as the loader says; None: it does not know.
        error: the exception that ended reading; None: there was none.
        trace: its traceback.
        draws_again: whether one epoch may hold a sample several times by design.
    """

    read: list[Any] = field(default_factory=list)
    is_whole: bool = False
    length: int | None = None
    error: Exception | None = None
    trace: str = ""
    draws_again: bool = False

    @property
    def epoch(self) -> int | None:
        """Batches of an epoch; None: not known, and more than were read."""
        return len(self.read) if self.is_whole else self.length


def read(loader: Any, name: str, *, most: int = MOST, seconds: float = 15.0) -> Batches:
    """Read the first batches of a loader.

    Args:
        loader: to iterate; its state is put back.
        name: of the argument, for messages.
        most: batches to read.
        seconds: after which no further batch is read, once there are two.

    Raises:
        UserError: if the loader is no iterable, or an iterator, which cannot be put back.
    """
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise UserError(f"doctor: {name}: expected a DataLoader or another iterable of batches, got {loader!r}")
    found = Batches(length=size_of(loader), draws_again=bool(getattr(_sampler(loader), "replacement", False)))
    end, held = time.monotonic() + seconds, 0
    with loader_state.preserved(loader, name):
        iterator = None
        try:
            iterator = iter(loader)
            while len(found.read) < most and held < MOST_BYTES:
                if len(found.read) >= 2 and time.monotonic() > end:
                    break
                batch = next(iterator)
                found.read.append(batch)
                held += size(batch)
        except StopIteration:
            found.is_whole = True
        except Exception as error:
            found.error, found.trace = error, "".join(traceback.format_exception(error)).rstrip()
        loader_internals.stop_workers(loader, iterator)  # also where the error's traceback holds the iterator
        del iterator  # before the loader's state is put back
    found.is_whole |= found.length == len(found.read) and found.error is None
    return found


def _sampler(loader: Any) -> Any:
    return getattr(loader, "sampler", None)
