"""A bound on what the tapes of a run store, which holds whatever happens in the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stabletrain.runtime.data.tape import Tape


class TapeLimit:
    """Drops the oldest batches of a tape when a new one goes beyond the limit; positions before them are then lost.

    Args:
        tapes: returns the tapes of all train loaders that the run reads now.
    """

    def __init__(self, tapes: Callable[[], Sequence[Tape]]) -> None:
        self._tapes = tapes
        self._sizes: dict[int, int] = {}  # of each tape, by its id, when it last grew: at least its present size
        self.set(math.inf, math.inf)

    def set(self, batches: float, nbytes: float, on_bytes_exceeded: Callable[[], None] | None = None) -> None:
        """Change the limit.

        Args:
            batches: on each tape, >= 1.
            nbytes: of the batches on all tapes together, bytes.
            on_bytes_exceeded: called when batches are dropped because of their bytes, once.
        """
        self._batches, self._nbytes, self._on_bytes_exceeded = batches, nbytes, on_bytes_exceeded

    def enforce(self, tape: Tape) -> None:
        """Called after an event was recorded on this tape."""
        while tape.batches > self._batches:
            tape.forget_before(tape.first + 1)
        if id(tape) not in self._sizes:  # loaders were reloaded: those of the old ones would stay for ever
            self._sizes = {id(each): each.nbytes for each in self._tapes()}
        self._sizes[id(tape)] = tape.nbytes
        if sum(self._sizes.values()) <= self._nbytes:
            return
        self._sizes = {id(each): each.nbytes for each in self._tapes()}
        others = sum(self._sizes.values()) - self._sizes.get(id(tape), 0)
        while tape.batches and tape.nbytes + others > self._nbytes:
            tape.forget_before(tape.first + 1)
            if self._on_bytes_exceeded is not None:
                call, self._on_bytes_exceeded = self._on_bytes_exceeded, None
                call()
