"""Fits that take turns on one device: each is a thread that makes some steps while the others wait.

So all cases are measured in the same minutes, at the same temperature and with a warm cache, and the memory that one
needs within a step is free for the next one. Processes in turn, as in `baton`, would each keep theirs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L

from gpu_suite.place import Place


class Turn(L.Callback):
    """Times blocks of steps, each from one complete wait for the device to the next; the last of the callbacks.

    Args:
        place: the device.
        first: steps of the first block, which does not count.
    """

    def __init__(self, place: Place, first: int) -> None:
        self._place, self._left = place, first
        self._go, self._done = threading.Event(), threading.Event()
        self._began, self._seconds, self._over = 0.0, 0.0, False
        self.error: BaseException | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._left -= 1
        if self._left:
            return
        self._place.synchronize()
        self._seconds = time.perf_counter() - self._began
        self._done.set()
        self._go.wait()
        self._go.clear()
        trainer.should_stop = self._over
        self._place.synchronize()
        self._began = time.perf_counter()

    def wait(self) -> float:
        """Wait for the end of a block; its seconds."""
        self._done.wait()
        self._done.clear()
        if self.error is not None:
            raise self.error
        return self._seconds

    def take(self, steps: int) -> float:
        """Make a block of steps; seconds."""
        self._left = steps
        self._go.set()
        return self.wait()

    def end(self) -> None:
        """End the training."""
        self._over = True
        self._go.set()

    def run(self, fit: Callable[[Turn], None]) -> None:
        """Train, in a thread of its own."""
        try:
            fit(self)
        except BaseException as error:
            self.error = error
            self._done.set()


def seconds_per_step(
    place: Place, cases: Mapping[str, Callable[[Turn], None]], first: Sequence[int], steps: Sequence[int]
) -> dict[str, list[float]]:
    """The time of a step of each case, in each round.

    Args:
        place: the device, and the number of rounds.
        cases: each trains, with the turn as its last callback.
        first: steps of each case that do not count.
        steps: of each case, in a block.
    """
    turns = {name: Turn(place, number) for name, number in zip(cases, first, strict=True)}
    threads = []
    for name, fit in cases.items():
        threads.append(threading.Thread(target=turns[name].run, args=(fit,), daemon=True))
        threads[-1].start()
        turns[name].wait()  # the next one begins when this one is warm
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(place.rounds):
        for (name, turn), number in zip(turns.items(), steps, strict=True):
            found[name].append(turn.take(number) / number)
    for turn, thread in zip(turns.values(), threads, strict=True):
        turn.end()
        thread.join()
        if turn.error is not None:
            raise turn.error
    return found
