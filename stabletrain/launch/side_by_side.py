"""Run jobs one after the other, or several side by side, each in a thread of its own that waits for its worker."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from stabletrain.launch.start_up import StartInterrupted, StartUp

Item = TypeVar("Item")
Done = TypeVar("Done")
_LOOK_EVERY = 0.2
"""Seconds; Python calls a signal handler only while the main thread runs."""


def run_each(
    items: Iterable[Item],
    work: Callable[[Item, int], Done],
    *,
    at_once: int,
    start_up: StartUp,
    ends: Callable[[Done], bool],
) -> Iterator[Done]:
    """Yield what ``work`` returns for each item, in the order in which they end.

    After a signal, an item for which ``ends`` is true, or an exception, no further item is begun; those that run are
    waited for.

    Args:
        items: the next one is taken when there is room for it; one thread at a time takes one.
        work: called with an item and the number of its place, 0 to ``at_once`` - 1.
        at_once: the maximum number of items at a time; 1: in this thread.
        start_up: the handler of signals, of the main thread.
        ends: whether a result ends everything.
    """
    if at_once == 1:
        for item in items:
            done = work(item, 0)
            yield done
            if start_up.signum or ends(done):
                return
        return
    pool = _Pool(iter(items), work, start_up, ends)  # type: ignore[arg-type]
    pool.left = at_once
    for place in range(at_once):
        # a second signal ends this process at once, without waiting for them
        threading.Thread(target=pool.run, args=(place,), name=f"job {place}", daemon=True).start()
    while True:
        with pool.changed:
            if not pool.done and pool.left:
                pool.changed.wait(timeout=_LOOK_EVERY)
            done_now, pool.done = pool.done, []
            is_over = not pool.left and not done_now
        yield from done_now  # type: ignore[misc]
        if is_over:
            break
    if pool.error is not None:
        raise pool.error


class _Pool:
    """What the threads of `run_each` share."""

    def __init__(
        self,
        items: Iterator[object],
        work: Callable[[object, int], object],
        start_up: StartUp,
        ends: Callable[[object], bool],
    ) -> None:
        self._items, self._work, self._start_up, self._ends = items, work, start_up, ends
        self._taking = threading.Lock()
        self._is_over = False
        self.changed = threading.Condition()
        self.done: list[object] = []
        self.left = 0
        self.error: BaseException | None = None

    def run(self, place: int) -> None:
        """One thread: take items until there are none, or something has ended everything."""
        try:
            while not self._is_over and not self._start_up.signum:
                with self._taking:
                    if self._is_over:
                        break
                    try:
                        item = next(self._items)
                    except StopIteration:
                        self._is_over = True
                        break
                done = self._work(item, place)
                with self.changed:
                    self.done.append(done)
                    self._is_over |= self._ends(done)
                    self.changed.notify()
        except BaseException as error:
            self._is_over = True
            # a mistake counts more than the signal that came while the others were waited for
            if self.error is None or isinstance(self.error, StartInterrupted):
                self.error = error
        finally:
            with self.changed:
                self.left -= 1
                self.changed.notify()


@dataclass(frozen=True)
class Place:
    """One of the places for jobs side by side.

    Args:
        number: 0 to ``count`` - 1.
        count: number of places. With more places than cores, some share one.
    """

    number: int
    count: int

    @property
    def is_shared(self) -> bool:
        """Whether other jobs run at the same time."""
        return self.count > 1

    @property
    def cores(self) -> list[int] | None:
        """The cores of this process that the worker here may use; None: all of them."""
        if not self.is_shared or not hasattr(os, "sched_getaffinity"):
            return None
        return shares(sorted(os.sched_getaffinity(0)), self.count)[self.number]


def shares(cores: Sequence[int], count: int) -> list[list[int]]:
    """Divide cores, as evenly as that goes; neighbours stay together.

    Args:
        cores: at least one.
        count: number of shares.

    >>> shares([0, 1, 2, 3, 4], 2), shares([2, 3], 3)
    ([[0, 1], [2, 3, 4]], [[2], [3], [2]])
    """
    if count > len(cores):
        return [[cores[place % len(cores)]] for place in range(count)]
    bounds = [len(cores) * place // count for place in range(count + 1)]
    return [list(cores[low:high]) for low, high in itertools.pairwise(bounds)]


def keep_on(process: subprocess.Popen[bytes], cores: Sequence[int] | None) -> None:
    """Let a process that has just been started, and all that it starts, run on some cores only.

    Args:
        process: the process.
        cores: from `Place`.
    """
    if cores is not None:
        try:
            os.sched_setaffinity(process.pid, cores)
        except OSError:  # it has ended, or the system does not allow it
            return


class Relay:
    """Prints what a process prints, with the job's number before each line.

    Args:
        process: started with its standard output as a pipe.
        prefix: of each line.
    """

    def __init__(self, process: subprocess.Popen[bytes], prefix: str) -> None:
        self._process, self._prefix = process, prefix
        self._thread = threading.Thread(target=self._print, name=f"output of {prefix}", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last lines; a process that somebody else has started may hold the pipe open."""
        self._thread.join(timeout=2.0)

    def _print(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip("\r\n")
            if text.strip():
                print(f"{self._prefix}{text}", flush=True, file=sys.stdout)
